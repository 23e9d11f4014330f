"""Few-step sampling by distillation of the sampler itself."""
