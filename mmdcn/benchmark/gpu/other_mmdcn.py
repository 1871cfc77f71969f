"""Times convolutions of whatever mmdcn is first on the path: of another version, for instance.

This is run as a program of its own, with that version's own modules for cases and timing, and says
which mmdcn it was.
"""

import argparse
import json
from pathlib import Path


def main(order: dict) -> None:
    import torch

    import mmdcn
    from mmdcn import timing
    from mmdcn.benchmark import cases, implementations

    device, result = torch.device(order["device"]), Path(order["result"])
    found = {"mmdcn": f"{mmdcn.__version__} in {Path(mmdcn.__file__).parent}", "rows": []}
    for fields in order["cases"]:
        case = cases.Case(**fields)
        bound = implementations.Mmdcn().bind(case, cases.make_tensors(case, device, 2.0))
        calls = {"forward": timing.Call(bound.infer), "forward_backward": timing.Call(bound.train)}
        samples = timing.interleave(calls, device, timing.Budget(**order["budget"]))
        row = {"stage": case.name, "dtype": case.dtype}
        row["milliseconds"] = {name: timing.median(taken) for name, taken in samples.items()}
        # With this somebody can see that both computed the same.
        row["mean_of_output"] = float(bound.infer().double().abs().mean())
        found["rows"].append(row)
        result.write_text(json.dumps(found))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description="Time convolutions. tools/gpu_check.py starts this."
    )
    parser.add_argument("order", type=json.loads, help="device, cases and result file, as JSON")
    main(parser.parse_args().order)
