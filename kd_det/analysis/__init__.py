"""What a config needs and costs, found out before a training is started."""
