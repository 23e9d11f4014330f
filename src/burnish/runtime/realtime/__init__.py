"""Acting while the next chunk is being computed."""
