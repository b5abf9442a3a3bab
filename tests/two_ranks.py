"""Two processes joined by gloo that run functions for tests: started once, because a start costs seconds of imports."""

import itertools
import os
import traceback

import torch
import torch.multiprocessing as multiprocessing
from torch import distributed

WORLD = 2
PATIENCE = 120  # seconds until a run counts as hung; a run takes a fraction of one


def _serve(rank, folder, pipe):
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(WORLD), LOCAL_RANK=str(rank))
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=WORLD)
    while (task := pipe.recv()) is not None:
        function, arguments, keywords = task
        torch.manual_seed(0)
        try:
            pipe.send((True, function(*arguments, **keywords)))
        except Exception as error:
            pipe.send((False, (f"{type(error).__name__}: {error}", traceback.format_exc())))
    distributed.destroy_process_group()


class TwoRanks:
    """``run(f, ...)`` calls a module-level function on both ranks and returns both results."""

    def __init__(self, folder):
        self.folder, self.starts = folder, itertools.count()
        self._start()

    def _start(self):
        folder = self.folder / str(next(self.starts))
        folder.mkdir()
        context = multiprocessing.get_context("spawn")
        self.pipes, self.processes = [], []
        for rank in range(WORLD):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(rank, folder, theirs), daemon=True)
            process.start()
            theirs.close()
            self.pipes.append(ours)
            self.processes.append(process)

    def both(self, function, *arguments, **keywords):
        """Per rank (True, result) or (False, (error, traceback)). Hung or dead ranks are an AssertionError."""
        for pipe in self.pipes:
            pipe.send((function, arguments, keywords))
        try:
            assert all(pipe.poll(PATIENCE) for pipe in self.pipes), f"{function.__name__} hung"
            return [pipe.recv() for pipe in self.pipes]
        except (AssertionError, EOFError):
            self.stop()
            self._start()  # the next test finds fresh ranks
            raise

    def run(self, function, *arguments, **keywords):
        replies = self.both(function, *arguments, **keywords)
        failed = [f"rank {rank}:\n{reply[1]}" for rank, (good, reply) in enumerate(replies) if not good]
        assert not failed, "\n".join(failed)
        return [result for _, result in replies]

    def errors(self, function, *arguments, **keywords):
        """The errors that both ranks raised. AssertionError when one did not."""
        replies = self.both(function, *arguments, **keywords)
        assert not any(good for good, _ in replies), replies
        return [error for _, (error, _) in replies]

    def stop(self):
        for pipe, process in zip(self.pipes, self.processes, strict=True):
            if process.is_alive():
                process.kill()
            process.join()
            pipe.close()
