"""What the packages share that is not distillation: files, random numbers, configs, compiling, folding, errors."""
