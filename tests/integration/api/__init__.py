"""Tests of the API on real databases, S3 and RabbitMQ."""
