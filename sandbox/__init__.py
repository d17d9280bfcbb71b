"""Private servers on free ports (RabbitMQ, S3, backend) for the demo and the tests."""
