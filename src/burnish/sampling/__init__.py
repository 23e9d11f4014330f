"""How actions come out of a network, on small protocols that no model is named in. See docs/methods/decode.md."""
