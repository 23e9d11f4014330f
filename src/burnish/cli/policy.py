"""`burnish policy`: how fast a policy is, how it decodes, and whether a shortcut says what it should."""

from burnish.cli.parser import Group, Legacy

COMMANDS = Group(
    "Profile a policy, decode with it, and verify shortcuts on it.",
    {
        "profile": Legacy("profile", "say where the time of a policy's call goes"),
        "decode": Legacy("decode", "decode a chunk of action tokens, in figures and a picture"),
        "verify": Legacy("verify", "check on a policy of yours that an estimate or a shortcut says what it should"),
    },
)
