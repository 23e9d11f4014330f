"""Act with fewer passes of the network: which sampler is still good enough, and what does it save?

    python examples/fast_sampler.py
    python examples/fast_sampler.py --policy path/to/smolvla --data path/to/dataset

Errors are in units of the policy's own sampling spread, on your observations. The chosen one is what
`burnish eval --sampler NAME` and `burnish policy serve --sampler NAME` take.
"""

import argparse
import time
from pathlib import Path

from burnish import load_policy, make_demos
from burnish.runtime.choose import compare_samplers
from burnish.runtime.executor import Runtime
from burnish.runtime.observations import observations
from burnish.sampling.solvers import make_solver


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--policy", default="small", help="a flow-matching policy: smolvla, pi0, pi05")
    parser.add_argument("--data", default="data/examples/lift", help="LeRobotDataset; recorded where it is missing")
    parser.add_argument("--demos", type=int, default=60, help="demonstrations to record")
    parser.add_argument("--calls", type=int, default=20, help="calls to time")
    args = parser.parse_args()

    if not Path(args.data).exists():
        make_demos("tabletop:lift", args.demos, args.data)
    policy = load_policy(args.policy).eval()
    found = compare_samplers(policy, args.data, count=32, noises=2, samplers=("euler:10", "euler:4", "ab2:4", "ab2:2"))
    for row in found["rows"]:
        print(f"{row['sampler']:<10} {row['passes']:>3} passes, error {row['error']:.3f} spreads, ok: {row['ok']}")
    print(f"chosen: {found['sampler']}\n")

    batch = observations(policy, 1, args.data)
    for name in (found["own"], found["sampler"]):
        runtime = Runtime(policy, solver=make_solver(name))
        runtime.act(batch)
        start = time.perf_counter()
        for _ in range(args.calls):
            runtime.act(batch)
        print(f"{name:<10} {1000 * (time.perf_counter() - start) / args.calls:.1f} ms a call")


if __name__ == "__main__":  # simulators run in processes of their own, which import this file
    main()
