"""`burnish_discrete`: a policy that writes a chunk of actions as tokens of a vision-language model.

configuration_discrete   the LeRobot config: how it tokenises, how it is trained, which decoder it uses
network                  prompt and action tokens through one language model
token_model              the network as decoders see it
tokenizers               actions to ids and back
noise                    which tokens are hidden in training
losses                   what is learned from them, and the likelihood
modeling_discrete        LeRobot's policy class
policy                   burnish's verbs over it
create                   a new policy on a VLM folder or on the VLM of a SmolVLA
"""
