"""Evidence for deformable layers under geometric transformation: a benchmark with controls."""

__arguments_first__ = True  # see mmdcn/startup.py
from mmdcn.engine import launch
from mmdcn.evidence import cli

if __name__ == "__main__":
    launch.run(
        cli.run,
        cli.parse_args,
        when_interrupted="the same command goes on with the runs that are not finished",
        log_to_stderr=True,
    )
