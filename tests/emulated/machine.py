"""Runs a command of this working tree on an emulated Sapphire Rapids: AMX for developers whose machine has none.

    python tests/emulated/machine.py -- python -m pytest -q tests/kernels/test_product.py -k amx

The machine is Bochs with Debian's Linux; its whole disk is the ramdisk that this script packs from the interpreter it
runs in and the working tree, at the paths they have here. It has one core, no network, and about a hundredth of a real
core's speed: it proves results, never times. docs/emulated.md tells what it needs, and what it can't show.
"""

from __future__ import annotations

import argparse
import os
import shlex
import shutil
import site
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
BUILD = ROOT / "build" / "emulated"
SUITE = "trixie"  # the Debian release that Bochs, its BIOS and Linux come from
KEYRING = "/usr/share/keyrings/debian-archive-keyring.gpg"
PACKAGES = ["bochsbios", "vgabios", "isolinux", "syslinux-common", "busybox-static"]
TOOLS = ["apt-get", "dpkg-deb", "g++", "make", "patch", "xorriso"]
CONFIGURE = [
    "--with-nogui", "--enable-cpu-level=6", "--enable-x86-64", "--enable-avx", "--enable-evex", "--enable-amx",
    "--enable-all-optimizations", "--enable-protection-keys", "--disable-vmx", "--disable-docbook", "--disable-xpm",
]  # fmt: skip
# Packages of the environment that tests don't import, and the standard library's own tests.
LEFT_OUT = {
    "cmake", "ninja", "Cython", "pip", "setuptools", "mypy", "mypyc", "ruff", "hf_xet", "scikit_build_core",
    "test", "idlelib", "ensurepip", "tkinter", "lib2to3", "turtledemo", "site-packages",
}  # fmt: skip
BEGIN, END = "----- begin", "----- end"


def run(*command: str | Path, cwd: Path | None = None, check: bool = True, **env: str) -> str:
    """Standard output of a command; its error output too when it fails."""
    done = subprocess.run(
        [str(c) for c in command], cwd=cwd, env=os.environ | env, text=True, capture_output=True, check=False
    )
    if check and done.returncode:
        raise SystemExit(f"{shlex.join(map(str, command))} failed:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    return done.stdout


def fetch() -> Path:
    """Debian's packages, unpacked side by side, with the source of Bochs; nothing is installed on this machine."""
    unpacked = BUILD / "debian"
    if unpacked.exists():
        return unpacked
    apt, downloads = BUILD / "apt", BUILD / "downloads"
    for folder in (apt / "lists" / "partial", apt / "cache" / "archives" / "partial", downloads):
        folder.mkdir(parents=True, exist_ok=True)
    (apt / "status").touch()
    mirrors = run("apt-get", "indextargets", "--format", "$(REPO_URI)", "Created-By: Packages").split()
    mirror = next((uri for uri in mirrors if uri.rstrip("/").endswith("/debian")), None)
    if mirror is None:
        raise SystemExit("apt knows no mirror of Debian; add one to its sources")
    source = f"[arch=amd64 signed-by={KEYRING}] {mirror} {SUITE} main\n"
    (apt / "sources.list").write_text(f"deb {source}deb-src {source}")
    (apt / "apt.conf").write_text(
        f'Dir::Etc::sourcelist "{apt}/sources.list"; Dir::Etc::sourceparts "-"; Dir::State::lists "{apt}/lists";\n'
        f'Dir::State::status "{apt}/status"; Dir::Cache "{apt}/cache"; APT::Sandbox::User "root";\n'
    )
    env = {"APT_CONFIG": str(apt / "apt.conf")}
    run("apt-get", "update", **env)
    linux = run("apt-cache", "depends", "linux-image-cloud-amd64", **env).split("Depends: ")[1].split()[0]
    run("apt-get", "download", linux, *PACKAGES, cwd=downloads, **env)
    # Mirrors that lack the signed description still have the source, whose hash apt has checked.
    run("apt-get", "source", "--download-only", "bochs", cwd=downloads, check=False, **env)
    partial = BUILD / "debian.partial"
    for package in downloads.glob("*.deb"):
        run("dpkg-deb", "-x", package, partial)
    [archive] = downloads.glob("bochs_*.orig.tar.*")
    (partial / "bochs").mkdir(exist_ok=True)
    run("tar", "xf", archive, "--strip-components=1", "-C", partial / "bochs")
    return partial.rename(unpacked)


def bochs() -> Path:
    """The emulator, built from Debian's source with bochs.patch."""
    source = fetch() / "bochs"
    program = source / "bochs"
    if not program.exists():
        print("building the emulator (a minute or two)", file=sys.stderr)
        run("patch", "-p1", "-N", "-i", HERE / "bochs.patch", cwd=source)
        run("./configure", *CONFIGURE, cwd=source, CXXFLAGS="-O3 -fno-strict-aliasing", CFLAGS="-O3")
        run("make", f"-j{os.cpu_count()}", cwd=source)
    return program


def tree(top: Path, left_out: frozenset[str] | set[str] = frozenset()) -> Iterator[Path]:
    """Files and links below top, without the entries named in left_out and this machine's own builds."""
    for folder, folders, files in os.walk(top):
        folders[:] = [f for f in folders if f not in left_out and not f.startswith((".", "build", "config-"))]
        yield from (Path(folder, f) for f in files if f not in left_out)


def payload() -> set[Path]:
    """What the guest gets, at the paths of this machine: the interpreter, its packages, their libraries, the tree."""
    base = Path(sys.base_prefix)
    library = base / "lib" / f"python{sys.version_info.major}.{sys.version_info.minor}"
    files = {*tree(library, LEFT_OUT), *tree(ROOT, {"bench", "fuzz", "docs", "csrc"}), ROOT / "pyproject.toml"}
    for packages in site.getsitepackages():
        files |= {*tree(Path(packages), LEFT_OUT)}
    prefix = Path(sys.prefix)
    files |= {prefix / "pyvenv.cfg", prefix / "bin" / "python", Path(sys.executable).resolve()}
    native = [f for f in files if ".so" in f.suffixes] + [Path(sys.executable).resolve()]
    files |= {Path(w) for w in run("ldd", *native, check=False).split() if w.startswith("/") and not w.endswith(":")}
    return {f for f in files if f.exists() and "mypyc" not in f.name}


def pack(out: Path, init: str, busybox: Path, files: set[Path]) -> None:
    """A ramdisk in cpio's newc format: the files, and init, run by busybox."""
    directories = {p for f in files for p in f.parents} | {Path(p) for p in ("/bin", "/dev", "/proc", "/sys", "/tmp")}
    with out.open("wb") as f:
        number = 0

        def entry(name: str, mode: int, data: bytes = b"", device: tuple[int, int] = (0, 0)) -> None:
            nonlocal number
            number += 1
            encoded = name.encode() + b"\0"
            fields = (number, mode, 0, 0, 1, 0, len(data), 0, 0, *device, len(encoded), 0)
            f.write(b"070701" + b"".join(b"%08X" % v for v in fields) + encoded)
            f.write(b"\0" * (-f.tell() % 4) + data)
            f.write(b"\0" * (-f.tell() % 4))

        for directory in sorted(directories - {Path("/")}):
            entry(str(directory)[1:], stat.S_IFDIR | 0o755)
        entry("dev/console", stat.S_IFCHR | 0o600, device=(5, 1))
        entry("bin/busybox", stat.S_IFREG | 0o755, busybox.read_bytes())
        entry("bin/sh", stat.S_IFLNK | 0o777, b"busybox")
        entry("init", stat.S_IFREG | 0o755, init.encode())
        for path in sorted(files):
            entry(str(path)[1:], stat.S_IFREG | (path.stat().st_mode & 0o777), path.read_bytes())
        entry("TRAILER!!!", 0)


def image(command: list[str]) -> Path:
    """A CD that boots Linux with the payload and runs the command."""
    debian, disk = fetch(), BUILD / "disk"
    (disk / "isolinux").mkdir(parents=True, exist_ok=True)
    library = f"{sys.base_prefix}/lib"
    init = f"""#!/bin/sh
b=/bin/busybox
$b mount -t proc p /proc; $b mount -t sysfs s /sys; $b mount -t devtmpfs d /dev; $b mount -t tmpfs t /tmp
$b --install -s /bin
$b ip link set lo up 2>/dev/null
export HOME=/tmp PATH={sys.prefix}/bin:/bin LD_LIBRARY_PATH={library} PYTHONDONTWRITEBYTECODE=1 NO_COLOR=1
cd {shlex.quote(str(ROOT))}
echo "{BEGIN}"
{shlex.join(command)}
echo "{END} $?"
$b sleep 100000
"""
    shutil.copy(debian / "usr/lib/ISOLINUX/isolinux.bin", disk / "isolinux")
    shutil.copy(debian / "usr/lib/syslinux/modules/bios/ldlinux.c32", disk / "isolinux")
    shutil.copy(next(debian.glob("boot/vmlinuz-*")), disk / "linux")
    # acpi=off: turning ACPI on enters system management mode, and Bochs stops where it should leave it.
    (disk / "isolinux" / "isolinux.cfg").write_text(
        "default linux\nprompt 0\nlabel linux\n  kernel /linux\n"
        "  append initrd=/ramdisk console=ttyS0 quiet nokaslr mitigations=off nosmp acpi=off lpj=4000000\n"
    )
    pack(disk / "ramdisk", init, debian / "usr/bin/busybox", payload())
    out = BUILD / "disk.iso"
    run("xorriso", "-as", "mkisofs", "-quiet", "-o", out, "-b", "isolinux/isolinux.bin", "-no-emul-boot",
        "-boot-load-size", "4", "-boot-info-table", disk)  # fmt: skip
    return out


def boot(disk: Path, memory: int, timeout: float) -> int:
    """Run the machine until the command has ended, its output to ours; the command's exit status."""
    debian, serial, settings = fetch(), BUILD / "serial.txt", BUILD / "bochsrc"
    serial.unlink(missing_ok=True)
    Path(f"{disk}.lock").unlink(missing_ok=True)
    settings.write_text(
        "display_library: nogui\n"
        "cpu: model=sapphire_rapids, count=1, ips=100000000, reset_on_triple_fault=0, ignore_bad_msrs=1\n"
        f"memory: guest={memory}, host={memory}\n"
        f"romimage: file={debian}/usr/share/bochs/BIOS-bochs-latest, options=fastboot\n"
        f"vgaromimage: file={debian}/usr/share/vgabios/vgabios.bin\n"
        "ata0: enabled=1, ioaddr1=0x1f0, ioaddr2=0x3f0, irq=14\n"
        f"ata0-master: type=cdrom, path={disk}, status=inserted\n"
        "boot: cdrom\n"
        f"com1: enabled=1, mode=file, dev={serial}\n"
        "clock: sync=none, time0=utc\n"
        f"log: {BUILD}/bochs.log\n"
        "panic: action=fatal\nerror: action=ignore\ninfo: action=ignore\n"
    )
    machine = subprocess.Popen([bochs(), "-q", "-f", settings], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    shown, began, deadline = 0, False, time.monotonic() + timeout
    try:
        while machine.poll() is None and time.monotonic() < deadline:
            time.sleep(0.2)
            text = serial.read_bytes().decode(errors="replace").replace("\r", "") if serial.exists() else ""
            if not began and f"{BEGIN}\n" in text:
                began, shown = True, text.index(f"{BEGIN}\n") + len(BEGIN) + 1
            if began:
                end = text.find(f"{END} ", shown)
                print(text[shown : end if end >= 0 else len(text)], end="", flush=True)
                shown = len(text)
                if end >= 0 and text.endswith("\n"):
                    return int(text[end:].split()[2])
        why = "time is up" if machine.poll() is None else "the machine stopped"
        print(f"{why}; see {serial} and {BUILD}/bochs.log", file=sys.stderr)
        return 124
    finally:
        machine.kill()
        machine.wait()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--memory", type=int, default=2048, help="MiB of the machine (default: %(default)s)")
    parser.add_argument("--timeout", type=float, default=3600, help="seconds it may run (default: %(default)s)")
    parser.add_argument("command", nargs="+", help="what to run there, in this folder")
    arguments = parser.parse_args()
    missing = [tool for tool in TOOLS if not shutil.which(tool)]
    if missing or not Path(KEYRING).exists():
        raise SystemExit(f"needed, on a Debian or Ubuntu machine: {' '.join(missing)} debian-archive-keyring")
    start = time.monotonic()
    bochs()
    status = boot(image(arguments.command), arguments.memory, arguments.timeout)
    print(f"exit status {status} after {time.monotonic() - start:.0f} s", file=sys.stderr)
    return status


if __name__ == "__main__":
    raise SystemExit(main())
