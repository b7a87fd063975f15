"""Two simulated hosts on one machine: two sets of namespaces, connected by a virtual cable, each with an sshd.

    python -m tests.distributed.two_hosts -- deepspeed --hostfile {hostfile} pipelines/train_video.py --config ...

runs a command on the first host; `{hostfile}` and `{local}` in it become paths. Needs root on Linux and
`apt-get install openssh-server pdsh iproute2`.

Each host has separate network, hostname, processes and mounts. The file system is shared, as in a cluster, except for
`local`, which is private to each host. The namespaces are unnamed and live as long as their first process: when it or
its parent ends, the kernel ends all their processes and removes the cable. Nothing outside the temporary folder is
written: ssh's configuration is mounted over the system's, only inside the hosts.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

ADDRESSES = ("10.77.0.1", "10.77.0.2")
NAMES = ("node-0", "node-1")
INTERFACE = "eth0"
PROGRAMS = ("sshd", "ssh", "ssh-keygen", "pdsh", "ip", "unshare", "nsenter", "setpriv")
PATH = os.pathsep.join((os.environ.get("PATH", os.defpath), "/usr/sbin", "/sbin"))
# --kill-child and --pdeathsig: a host ends with its holder process, and the holder with this process, however it ends.
ISOLATED = ("unshare", "--net", "--uts", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc")
BOOT = """\
set -e
hostname "$1"
mount -t tmpfs tmpfs /run
mkdir -m 755 /run/sshd
mount -t tmpfs tmpfs "$2/local"
mount --bind "$2/ssh_config" /etc/ssh/ssh_config
ip link set lo up
exec "$3" -D -e -f "$2/sshd_config"
"""
SSHD_CONFIG = """\
HostKey {folder}/host_key
AuthorizedKeysFile {folder}/user_key.pub
AuthenticationMethods publickey
PermitRootLogin prohibit-password
StrictModes no
UsePAM yes
PidFile none
"""
SSH_CONFIG = """\
Host *
  IdentityFile {folder}/user_key
  IdentitiesOnly yes
  UserKnownHostsFile {folder}/known_hosts
  BatchMode yes
"""


class HostError(RuntimeError):
    """A host did not start, or a command on it did not end; the message contains the output."""


def missing_requirement() -> str | None:
    """The reason why two hosts cannot run here, or None."""
    if not sys.platform.startswith("linux") or os.geteuid() != 0:
        return "two hosts on one machine need root on Linux"
    if missing := [name for name in PROGRAMS if shutil.which(name, path=PATH) is None]:
        return f"{', '.join(missing)} not found: apt-get install openssh-server pdsh iproute2"
    cable = ("ip", "link", "add", INTERFACE, "type", "veth", "peer", "name", "eth1")
    probe = subprocess.run([*ISOLATED, *cable], env=clean_environment(), capture_output=True, text=True, check=False)
    return f"this kernel or container forbids namespaces: {probe.stderr.strip()}" if probe.returncode else None


def clean_environment(**more: str) -> dict[str, str]:
    """The environment of a login shell, without variables of a surrounding launch or cluster job."""
    kept = ("HOME", "LANG", "LC_ALL", "TERM", "TMPDIR", "USER", "LOGNAME")
    return {name: os.environ[name] for name in kept if name in os.environ} | {"PATH": PATH} | more


def inside(holder: int, command: Sequence[str]) -> list[str]:
    """The command line that runs `command` on the host that the process `holder` keeps."""
    spaces = ("--net", "--uts", "--mount", f"--pid=/proc/{holder}/ns/pid_for_children")
    return ["nsenter", f"--target={holder}", *spaces, f"--wd={os.getcwd()}", "--", *command]


@dataclass(frozen=True)
class Finished:
    """Result of a command.

    Attributes:
        output: stdout and stderr together.
    """

    returncode: int
    output: str


@dataclass(frozen=True)
class TwoHosts:
    """Two running hosts.

    Attributes:
        folder: temporary and shared; contains the keys, `hostfile`, and `local`, which is private to each host.
        holders: pids of the processes that keep the hosts' namespaces.
    """

    folder: Path
    holders: tuple[int, int]

    @property
    def hostfile(self) -> Path:
        return self.folder / "hostfile"

    @property
    def local(self) -> Path:
        return self.folder / "local"

    def on(self, host: int, command: Sequence[str]) -> list[str]:
        """The command line that runs `command` on a host."""
        return inside(self.holders[host], command)

    def run(self, *commands: Sequence[str], timeout: float, **environment: str) -> list[Finished]:
        """Run one command per host concurrently; a single command runs on the first host.

        Raises:
            HostError: on timeout; remaining processes end with the hosts.
        """
        deadline = time.monotonic() + timeout
        logs = [self.folder / f"command-{time.monotonic_ns()}-{host}.log" for host in range(len(commands))]
        started = []
        for host, (command, log) in enumerate(zip(commands, logs, strict=True)):
            with log.open("wb") as stream:  # a file, because orphaned processes would keep a pipe open
                started.append(
                    subprocess.Popen(
                        self.on(host, command),
                        env=clean_environment(**environment),
                        stdin=subprocess.DEVNULL,
                        stdout=stream,
                        stderr=subprocess.STDOUT,
                    )
                )
        try:
            codes = [process.wait(max(0.0, deadline - time.monotonic())) for process in started]
        except subprocess.TimeoutExpired as error:
            output = "\n".join(log.read_text(errors="replace")[-6000:] for log in logs)
            raise HostError(f"no end after {timeout:.0f} s: {' '.join(error.cmd)}\n{output}") from None
        return [Finished(code, log.read_text(errors="replace")) for code, log in zip(codes, logs, strict=True)]


@contextmanager
def two_hosts(slots: int = 1) -> Iterator[TwoHosts]:
    """Start two hosts; at the end, stop them and all their processes.

    Args:
        slots: ranks per host in the hostfile.
    """
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="two-hosts-")))
        write_files(folder, slots)
        holders = [stack.enter_context(booted(folder, name)) for name in NAMES]
        hosts = TwoHosts(folder, (holders[0].pid, holders[1].pid))
        connect(hosts)
        yield hosts


def write_files(folder: Path, slots: int) -> None:
    """Write ssh keys and configurations, and the hostfile."""
    (folder / "local").mkdir()
    (folder / "hostfile").write_text("".join(f"{address} slots={slots}\n" for address in ADDRESSES))
    for key in ("host_key", "user_key"):
        command = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / key)]
        subprocess.run(command, env=clean_environment(), check=True)
    host_key = " ".join((folder / "host_key.pub").read_text().split()[:2])
    (folder / "known_hosts").write_text("".join(f"{address} {host_key}\n" for address in ADDRESSES))
    (folder / "sshd_config").write_text(SSHD_CONFIG.format(folder=folder))
    (folder / "ssh_config").write_text(SSH_CONFIG.format(folder=folder))


@contextmanager
def booted(folder: Path, name: str) -> Iterator[subprocess.Popen[bytes]]:
    """The process that holds a host, from when its sshd listens until everything on the host has ended."""
    sshd = shutil.which("sshd", path=PATH)
    command = ["setpriv", "--pdeathsig=KILL", *ISOLATED, "sh", "-c", BOOT, "boot", name, str(folder), str(sshd)]
    log = folder / f"{name}.log"
    with log.open("wb") as stream:
        process = subprocess.Popen(
            command, env=clean_environment(), stdin=subprocess.DEVNULL, stdout=stream, stderr=subprocess.STDOUT
        )
    try:
        deadline = time.monotonic() + 20
        while "Server listening" not in log.read_text():
            if process.poll() is not None or time.monotonic() > deadline:
                raise HostError(f"{name} did not start: {log.read_text()}")
            time.sleep(0.05)
        yield process
    finally:
        if process.poll() is None:  # sshd is process 1 of the host, so all others end with it
            end = inside(process.pid, ["sh", "-c", "kill 1"])
            subprocess.run(end, stderr=subprocess.DEVNULL, check=False)  # it may already be ending
            time.sleep(0.2)
        process.kill()
        process.wait()


def connect(hosts: TwoHosts) -> None:
    """Connect the hosts by a virtual cable, whose ends are both called INTERFACE."""
    first, second = map(str, hosts.holders)
    cable = ["ip", "link", "add", INTERFACE, "netns", first, "type", "veth", "peer", "name", INTERFACE, "netns", second]
    subprocess.run(cable, env=clean_environment(), check=True)
    for host, address in enumerate(ADDRESSES):
        for arguments in (["address", "add", f"{address}/24", "dev", INTERFACE], ["link", "set", INTERFACE, "up"]):
            subprocess.run(hosts.on(host, ["ip", *arguments]), env=clean_environment(), check=True)


def main() -> int:
    command = sys.argv[2:] if sys.argv[1:2] == ["--"] else sys.argv[1:]
    if not command or command[0] in ("-h", "--help"):
        print(__doc__)
        return 2
    if reason := missing_requirement():
        print(f"error: {reason}", file=sys.stderr)
        return 1
    signal.signal(
        signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM)
    )  # so that the folder is removed in this case too
    with two_hosts() as hosts:
        command = [word.format(hostfile=hosts.hostfile, local=hosts.local) for word in command]
        return subprocess.run(hosts.on(0, command), check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
