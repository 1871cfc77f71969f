"""A hook that ends the process at one moment of training, as the environment variable says."""

import os
import resource
import signal

from mmengine.hooks import Hook, checkpoint_hook
from mmengine.registry import HOOKS


def die(*_):
    os.kill(os.getpid(), signal.SIGKILL)


def open_and_die(path, mode):
    with open(path, mode):
        die()


@HOOKS.register_module()
class DeadlyHook(Hook):
    """Ends the process in the epoch and at the moment that ``DIE=epoch:moment`` names."""

    def __init__(self):
        epoch, _, self.moment = os.environ.get("DIE", "0:").partition(":")
        self.epoch = int(epoch)

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        if self.moment == "training" and runner.epoch + 1 == self.epoch:
            die()

    def before_save_checkpoint(self, runner, checkpoint):
        if runner.epoch + 1 != self.epoch:
            return
        if self.moment == "writing":
            # The kernel ends the process within the write that makes a file larger than this.
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
            resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
            signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
        if self.moment == "recording":
            # When the name of the last checkpoint is to be written to a file that is empty by then.
            checkpoint_hook.open = open_and_die
