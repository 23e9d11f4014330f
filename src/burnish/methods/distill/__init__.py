"""Fine-tuning a token policy for block-wise decoding."""
