"""RabbitMQ: queues, deliveries and publications."""
