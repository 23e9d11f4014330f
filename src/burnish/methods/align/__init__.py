"""Multi-layer representation alignment with a frozen 3D teacher."""
