"""A second engine for the functions over rows: the machines of a Ray cluster, in the place of this one's processes.

Reading, the search for copies and writing stay on the machine that the command was given on; batches of rows travel to
the workers and come back cleaned. The workers need no checkout: the packages that hold the functions travel with them.
"""

import importlib.util
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from common.errors import RunFailed, UserError
from common.workers import default_workers

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("cleaning", "common", "data", "model")


class Ray:
    """map() as common.workers.Pool has it, by the CPUs of the cluster that RAY_ADDRESS names, else by `workers`
    processes of a Ray on this machine, which begins and ends with the map."""

    held_here = 0  # workers whose memory counts as this machine's

    def __init__(self, workers: int | None):
        self.address = os.environ.get("RAY_ADDRESS", "local")
        if workers and self.address != "local":
            raise UserError(f"--workers would change nothing: the cluster at {self.address} has CPUs of its own")
        if importlib.util.find_spec("ray") is None:
            raise UserError("--engine ray needs the package ray (on Linux): pip install -r requirements-ray.txt")
        self.workers = workers or default_workers()

    def map(self, function: Callable, batches: Iterable, *context) -> Iterator:
        """Yields function(batch, *context) for each batch, in order; the context is sent to the cluster once.

        At most 2 x workers batches are under way. A batch whose worker or machine is lost is given to another one,
        three times (Ray's own rule); then, and where the function fails, raises RunFailed.
        """
        import ray

        self._join(ray)
        try:
            remote, context = ray.remote(function), [ray.put(part) for part in context]
            waiting = deque()
            for batch in batches:
                waiting.append(remote.remote(batch, *context))
                if len(waiting) > 2 * self.workers:
                    yield ray.get(waiting.popleft())
            while waiting:
                yield ray.get(waiting.popleft())
        except ray.exceptions.RayTaskError as error:  # what the function raised stands last in its traceback
            words = str(error).strip().splitlines()[-1]
            raise RunFailed(f"a worker failed: {words}; every machine needs the packages of requirements.txt") from None
        except ray.exceptions.RayError as error:
            raise RunFailed(f"Ray gave up: {_first_line(error)} Give the same command again") from None
        finally:
            ray.shutdown()

    def _join(self, ray) -> None:
        os.environ["RAY_USAGE_STATS_ENABLED"] = "0"  # else a Ray that is started here reports to its makers
        begin = {"num_cpus": self.workers, "include_dashboard": False} if self.address == "local" else {}
        sent = {"py_modules": [str(ROOT / package) for package in PACKAGES]}
        try:
            ray.init(self.address, log_to_driver=False, logging_level="error", runtime_env=sent, **begin)
        except (ConnectionError, RuntimeError, ValueError) as error:
            raise UserError(f"no Ray to be had at {self.address}: {_first_line(error)}") from None
        self.workers = int(ray.cluster_resources().get("CPU", 1))
        machines = sum(node["Alive"] for node in ray.nodes())
        print(f"Ray ({self.address}): {self.workers} CPUs on {machines} machine(s)", flush=True)


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]
