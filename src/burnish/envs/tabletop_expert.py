"""Scripted expert of the tabletop. It looks only at the present moment, so it recovers from any slip."""

from typing import TYPE_CHECKING

import numpy as np

from burnish.core.seeding import derive_seed
from burnish.envs.tabletop_scene import DIRECTIONS

if TYPE_CHECKING:
    from burnish.envs.tabletop import Tabletop

TRAVEL_HEIGHT = 0.13
GRASP_HEIGHT = 0.02
HOVER_HEIGHT = 0.085
CLOSED_OPENING = 0.075
"""Fingers nearer together than this have closed on something (an object is 5.2 cm wide)."""
MISS = (0.0, 0.06)
"""How far beside its object the expert that misses grasps, in metres: behind it, along the fingers' broad side. Half of
that, which a policy may make of both grasps, misses most objects too."""


class TabletopExpert:
    """Acts on object `source` as the family asks; `seed` draws how sloppily it approaches."""

    def __init__(self, env: "Tabletop", source: int, seed: int):
        self.env, self.source = env, source
        rng = np.random.default_rng(derive_seed("tabletop expert", seed))
        # Approaching beside the point and correcting on the way down shows a student how to recover.
        self.slop = rng.normal(0, 0.012, 2)
        self.travel = TRAVEL_HEIGHT + rng.uniform(-0.01, 0.02)

    def act(self) -> np.ndarray:
        if self.env.family == "reach":
            goal, grip = self._above(self.env.object_position(self.source)[:2], HOVER_HEIGHT), -1.0
        elif self.env.family == "push":
            goal, grip = self._push()
        else:
            goal, grip = self._carry()
        motion = np.clip((goal - self.env.hand_position()) / 0.04, -1, 1)
        return np.array([*motion, grip], np.float32)

    def _above(self, place: np.ndarray, low: float, tolerance: float = 0.012) -> np.ndarray:
        """Go over `place` at travel height, then down to `low`, steering all the way."""
        hand = self.env.hand_position()
        gap = np.linalg.norm(place - hand[:2])
        if gap > 0.05:
            return np.array([*(place + self.slop), self.travel])
        if gap > tolerance and hand[2] > low + 0.03:
            return np.array([*place, max(low + 0.05, hand[2] - 0.02)])
        return np.array([*place, low])

    def _push(self) -> tuple[np.ndarray, float]:
        env = self.env
        way = np.array(DIRECTIONS[env.direction])
        hand, place = env.hand_position(), env.object_position(self.source)[:2]
        offset = hand[:2] - place
        behind, aside = -(offset @ way), np.linalg.norm(offset - (offset @ way) * way)
        start = place - way * 0.07
        if hand[2] < 0.05 and behind > 0.02 and aside < 0.02:  # in position: push straight through
            return np.array([*(place + way * 0.04), 0.03]), 1.0
        return self._above(start, 0.03), 1.0

    def _carry(self) -> tuple[np.ndarray, float]:
        """Grasp, lift, and for put_on and stack bring the object over the target and let go."""
        env = self.env
        hand, held = env.hand_position(), env.object_position(self.source)
        opening = float(env.observe().state[3])
        in_hand = np.linalg.norm((held - hand)[:2]) < 0.025 and abs(held[2] - hand[2]) < 0.03
        if not in_hand or hand[2] > 0.05 and env.data.ctrl[0] > 0:
            return self._above(held[:2], GRASP_HEIGHT), -1.0
        if opening > CLOSED_OPENING:
            low = hand[2] < GRASP_HEIGHT + 0.012
            return np.array([*held[:2], GRASP_HEIGHT]), 1.0 if low else -1.0
        if env.family == "lift":
            return np.array([hand[0], hand[1], 0.16]), 1.0
        return self._deliver(hand, held)

    def _deliver(self, hand: np.ndarray, held: np.ndarray) -> tuple[np.ndarray, float]:
        env = self.env
        target = env.object_position(env.target)
        objects = env.layout.objects
        rest = target[2] + objects[env.target].rest_height + objects[self.source].rest_height
        shift = (target - held)[:2]
        gap = np.linalg.norm(shift)
        if gap > 0.012:
            clear = rest + 0.06
            if hand[2] < clear - 0.03 and gap > 0.04:
                return np.array([*hand[:2], clear]), 1.0
            return np.array([*(hand[:2] + shift), clear]), 1.0
        lowered = held[2] < rest + 0.008
        return np.array([*(hand[:2] + shift), hand[2] + rest - held[2]]), -1.0 if lowered else 1.0


class MissingTabletopExpert(TabletopExpert):
    """Does all as the expert of lift does it, `MISS` beside the object, and so lifts nothing."""

    def _carry(self) -> tuple[np.ndarray, float]:
        hand = self.env.hand_position()
        if self._closed:
            return np.array([*hand[:2], 0.16]), 1.0
        aim = self.env.object_position(self.source)[:2] + MISS
        low = hand[2] < GRASP_HEIGHT + 0.012 and np.linalg.norm(aim - hand[:2]) < 0.012
        return self._above(aim, GRASP_HEIGHT), 1.0 if low else -1.0

    @property
    def _closed(self) -> bool:
        return float(self.env.observe().state[3]) < CLOSED_OPENING

    @property
    def done(self) -> bool:
        """The closed hand is as high as an object would have been lifted."""
        return self._closed and bool(self.env.hand_position()[2] > TRAVEL_HEIGHT)
