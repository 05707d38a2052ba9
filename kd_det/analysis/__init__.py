"""What a config needs and what it will cost, before a training is started."""
