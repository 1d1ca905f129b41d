"""File systems that fail: `on` begins it, `off` ends it."""

import contextlib
import os
import shutil
import subprocess


@contextlib.contextmanager
def small_disk(folder):
    """A file system of 3 MB of our own in a folder; yields None where mounting is not permitted."""
    command = ["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", str(folder)]
    if not shutil.which("mount") or subprocess.run(command, capture_output=True).returncode:
        yield None
        return
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


class Full:
    """Fills the disk to the last byte, and frees it."""

    def __init__(self, disk):
        self.path = disk / "filler"

    def on(self):
        file = os.open(self.path, os.O_CREAT | os.O_WRONLY)
        try:
            while True:
                os.write(file, bytes(4096))
        except OSError:
            os.close(file)

    def off(self):
        self.path.unlink()


class NearlyFull(Full):
    """Leaves room for names and records, but not for arrays."""

    def on(self):
        free = os.statvfs(self.path.parent)
        self.path.write_bytes(bytes(free.f_bavail * free.f_bsize - 200_000))


class ReadOnly:
    def __init__(self, disk):
        self.disk = disk

    def on(self):
        subprocess.run(["mount", "-o", "remount,ro", str(self.disk)], check=True)

    def off(self):
        subprocess.run(["mount", "-o", "remount,rw", str(self.disk)], check=True)


class InTheWay:
    """A file where the directory of checkpoints was; needs no mount."""

    def __init__(self, disk):
        self.folder, self.kept = disk / "checkpoints", disk / "kept"

    def on(self):
        self.folder.rename(self.kept)
        self.folder.write_text("no directory")

    def off(self):
        self.folder.unlink()
        self.kept.rename(self.folder)
