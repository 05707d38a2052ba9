"""Numbers that networks and data sets share."""

# CIFAR-100's channel mean and standard deviation, white being 1, as in the papers' released code.
CIFAR100_MEAN = (0.5071, 0.4867, 0.4408)
CIFAR100_STD = (0.2675, 0.2565, 0.2761)
