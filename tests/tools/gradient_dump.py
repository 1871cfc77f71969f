"""A hook for configs under test: writes the gradients that the first optimizer step uses."""

import torch
from mmengine.hooks import Hook
from mmengine.registry import HOOKS


@HOOKS.register_module()
class GradientDumpHook(Hook):
    """Write ``gradients_<rank>.pth`` into the work folder: name of parameter to gradient."""

    def before_train(self, runner):
        model = getattr(runner.model, "module", runner.model)
        path = f"{runner.work_dir}/gradients_{runner.rank}.pth"

        def dump(*_):
            torch.save({name: p.grad for name, p in model.named_parameters()}, path)

        runner.optim_wrapper.optimizer.register_step_pre_hook(dump)
