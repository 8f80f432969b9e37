"""The tests' own Slurm cluster (tests/slurm/cluster.sh), used from Python as an ordinary user."""

from __future__ import annotations

import fcntl
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO

REPOSITORY = Path(__file__).resolve().parent.parent
SCRIPT = REPOSITORY / "tests" / "slurm" / "cluster.sh"
USER = "lab"
HOME = Path("/home", USER)
LOCKS = Path("/run")


class Cluster:
    """Two cpu nodes, two gpu nodes with eight GPUs each, and user ``lab`` on a login node that sees the same files.

    Several run side by side and know nothing of each other; each is used by one session of pytest at a time.
    """

    def __init__(self) -> None:
        self.number = 0
        self.python = Path(sys.executable)  # also lab's, wherever it lies: see ``up``
        self._lock: IO[str] | None = None
        self._shared: Path | None = None
        self._repairs: dict[str, Callable[[], None]] = {}
        self._helpers: list[subprocess.Popen[str]] = []

    @staticmethod
    def obstacle() -> str | None:
        """Return why a cluster cannot run on this machine; None if it can."""
        asked = subprocess.run([SCRIPT, "check"], capture_output=True, text=True)
        return asked.stderr.strip().removeprefix("cluster: error: ") if asked.returncode else None

    def up(self) -> None:
        """Start the first cluster that nobody uses, or what is missing of it. Needs root."""
        while not self._is_mine(self.number + 1):
            self.number += 1
        self.number += 1
        self._script("up", timeout=900)
        # Python and the checkout may lie in a closed folder, such as /root; lab sees them there all the same
        self._script("reach", *dict.fromkeys(map(str, (REPOSITORY, sys.prefix, sys.base_prefix))))
        self._shared = Path(tempfile.mkdtemp(prefix="amlaunch-cluster-", dir="/tmp"))
        self._shared.chmod(0o755)
        self.cancel_all()
        self._check_python()

    def _is_mine(self, number: int) -> bool:
        self._lock = (LOCKS / f"amlaunch-cluster-{number}.lock").open("w")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._lock.close()
            return False
        return True

    def down(self, keep: bool = False) -> None:
        """Cancel every job, delete the shared folder, and stop the cluster unless ``keep``."""
        try:
            if self._shared:
                self.tidy()
        finally:
            if not keep:
                self._script("down")
            if self._shared:
                shutil.rmtree(self._shared, ignore_errors=True)
            if self._lock:
                self._lock.close()

    def run(
        self,
        *argv: str | Path,
        cwd: Path | None = None,
        env: Mapping[str, str] | None = None,
        timeout: float = 60,
        check: bool = True,
    ) -> subprocess.CompletedProcess[str]:
        """Run a command as lab on the login node, in a clean environment plus ``env``, in ``cwd`` or lab's home."""
        done = subprocess.run(
            self._as_lab(argv, env),
            cwd=cwd or HOME,
            capture_output=True,
            text=True,
            stdin=subprocess.DEVNULL,
            timeout=timeout,
        )
        return _checked(done) if check else done

    def popen(
        self, *argv: str | Path, cwd: Path | None = None, env: Mapping[str, str] | None = None
    ) -> subprocess.Popen[str]:
        """Start a command like ``run`` without waiting for it; its process ID is the command's own."""
        return subprocess.Popen(
            self._as_lab(argv, env),
            cwd=cwd or HOME,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def helper(self, *argv: str | Path, cwd: Path, env: Mapping[str, str]) -> subprocess.Popen[str]:
        """Start a command of lab's that answers lines on its standard input until the end of the test."""
        made = subprocess.Popen(
            self._as_lab(argv, env), cwd=cwd, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self._helpers.append(made)
        return made

    def on(
        self, node: str, *argv: str | Path, timeout: float = 60, check: bool = True
    ) -> subprocess.CompletedProcess[str]:
        """Run a command as root on a node."""
        return self._script("sh", node, *argv, timeout=timeout, check=check)

    def mount(self, folder: Path, size: str) -> None:
        """Mount a separate disk at lab's ``folder``, until :meth:`unmount`."""
        self._script("mount", "-t", "tmpfs", "-o", f"size={size},mode=1777", "tmpfs", folder)

    def unmount(self, folder: Path) -> None:
        """Unmount the disk."""
        self._script("umount", folder)

    def crash(self, node: str) -> None:
        """Cut the power of a node; Slurm notices after half a minute. ``revive`` or the end of the test undoes it."""
        self._repairs[node] = lambda: self.revive(node)
        self._script("crash", node)

    def revive(self, node: str) -> None:
        """Boot a crashed node: its jobs fail with NODE_FAIL at once, unless Slurm had noticed before."""
        self._script("revive", node)
        self._repairs.pop(node, None)

    def stop_ctld(self) -> None:
        """Stop the controller: squeue, sbatch and scontrol fail, running jobs continue."""
        self._repairs["slurmctld"] = self.start_ctld
        self._script("ctld-stop")

    def start_ctld(self) -> None:
        """Start the controller again."""
        self._script("ctld-start")
        self._repairs.pop("slurmctld", None)

    def stop_accounting(self) -> None:
        """Stop the accounting daemon: sacct fails, everything else continues."""
        self._repairs["slurmdbd"] = self.start_accounting
        self._script("acct-off")

    def start_accounting(self) -> None:
        """Start the accounting daemon again."""
        self._script("acct-on")
        self._repairs.pop("slurmdbd", None)

    def kill_slurmd(self, node: str) -> None:
        """Kill the daemon of a node, not its jobs, and start it again after a moment."""
        self.on(node, "sh", "-c", f"kill -9 $(cat /var/spool/slurmd/{node}/slurmd.pid)")
        time.sleep(2)
        self.on(node, "setsid", "slurmd")

    @contextmanager
    def changed(self, what: str, state: str, normal: str) -> Iterator[None]:
        """Set the state of nodes or of a partition: ``nodename=gpu1``, ``drain``, ``resume``."""
        self.on("gpu1", "scontrol", "update", what, f"state={state}", *(["reason=test"] if "node" in what else []))
        try:
            yield
        finally:
            self.on("gpu1", "scontrol", "update", what, f"state={normal}")

    @contextmanager
    def without(self, setting: str) -> Iterator[None]:
        """Run the cluster without one setting of slurm.conf."""
        self._script("without", setting)
        try:
            yield
        finally:
            self._script("restore")

    def cancel_all(self, timeout: float = 90) -> None:
        """Cancel all jobs of lab and wait until the last has ended."""
        deadline = time.monotonic() + timeout
        while jobs := self.run("squeue", "--noheader", "--user", USER, "--format=%i %T").stdout:
            if time.monotonic() > deadline:
                raise TimeoutError(f"jobs that do not end:\n{jobs}")
            self.run("scancel", "--user", USER, check=False)
            time.sleep(0.2)

    def tidy(self) -> None:
        """Repair what a test broke, end its helpers, and cancel every job."""
        while self._helpers:
            helper = self._helpers.pop()
            helper.communicate(timeout=30)
        for name in sorted(self._repairs, key=lambda name: not name.startswith("slurm")):  # a node needs the daemons
            self._repairs[name]()
        self.cancel_all()

    def folder(self, name: str) -> Path:
        """Create a folder of lab's that all nodes see."""
        assert self._shared, "the cluster is not up"
        folder = Path(tempfile.mkdtemp(prefix=f"{name}-", dir=self._shared))
        folder.chmod(0o755)
        shutil.chown(folder, USER, USER)
        return folder

    def _script(self, *argv: str | Path, timeout: float = 120, check: bool = True) -> subprocess.CompletedProcess[str]:
        command = ["env", f"AMLAUNCH_CLUSTER={self.number}", SCRIPT, *argv]
        done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=timeout)
        return _checked(done) if check else done

    def _as_lab(self, argv: tuple[str | Path, ...], env: Mapping[str, str] | None) -> list[str | Path]:
        variables = {"PATH": f"{self.python.parent}:/usr/local/bin:/usr/bin:/bin", **(env or {})}
        number = f"AMLAUNCH_CLUSTER={self.number}"
        return ["env", number, SCRIPT, "lab", "env", *(f"{name}={value}" for name, value in variables.items()), *argv]

    def _check_python(self) -> None:
        asked = self.run(self.python, "-P", "-c", "import amlaunch.recipes, amlaunch.launcher, yaml", check=False)
        if asked.returncode:
            raise PermissionError(
                f"user {USER} cannot run {self.python} with the packages of {REPOSITORY}: make their files readable "
                f"for others (chmod -R o+rX)\n{asked.stderr}"
            )


def _checked(done: subprocess.CompletedProcess[str]) -> subprocess.CompletedProcess[str]:
    if done.returncode:
        command = " ".join(map(str, done.args))
        raise AssertionError(f"exit code {done.returncode} of: {command}\n{done.stdout}{done.stderr}")
    return done
