"""Fine-tune without erasing what the VLM knows: AEGIS (arXiv:2604.16067), corrected variants, and every baseline."""
