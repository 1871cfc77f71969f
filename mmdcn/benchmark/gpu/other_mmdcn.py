"""Times one convolution of whatever mmdcn is first on the path: of another version, for instance.

This is run as a program of its own, with the other version's modules for cases and timing, and says
which mmdcn that was.
"""

import json
import sys
from pathlib import Path

import torch


def main(order: dict) -> None:
    import mmdcn
    from mmdcn import timing
    from mmdcn.benchmark import cases, implementations

    device = torch.device(order["device"])
    case = cases.Case(**order["case"])
    bound = implementations.Mmdcn().bind(case, cases.make_tensors(case, device, offset_std=2.0))
    calls = {"forward": timing.Call(bound.infer), "forward_backward": timing.Call(bound.train)}
    samples = timing.interleave(calls, device, timing.Budget(**order["budget"]))
    found = {
        "mmdcn": f"{mmdcn.__version__} in {Path(mmdcn.__file__).parent}",
        "milliseconds": {name: timing.median(taken) for name, taken in samples.items()},
        "sum_of_output": float(bound.infer().double().abs().sum()),
    }
    Path(order["result"]).write_text(json.dumps(found))


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
