"""What the tests need of the outside world, one module per thing."""
