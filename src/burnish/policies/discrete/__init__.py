"""`burnish_discrete`: a policy that writes a chunk of actions as tokens of a vision-language model."""
