"""VMMs that hand their memory over (vmm.c), and the memory file that serves them."""

from __future__ import annotations

import array
import subprocess
from pathlib import Path

HERE = Path(__file__).parent
MIB = 1 << 20
PAGE = 4096
SIZE_MIB = 16
SECONDS = 30.0
MASK = (1 << 64) - 1


def memory_bytes(size: int) -> bytes:
    """What vmm.c expects: a word that depends on its offset, and each tenth page zero."""
    words = array.array("Q")
    for page in range(size // PAGE):
        begin = page * PAGE
        words.extend(
            0 if page % 10 == 3 else (o + 0x9E3779B97F4A7C15) * 0xBF58476D1CE4E5B9 & MASK
            for o in range(begin, begin + PAGE, 8)
        )
    return words.tobytes()


def make_memory_file(path: Path) -> Path:
    """A raw one with holes."""
    data = memory_bytes(SIZE_MIB * MIB)
    with path.open("wb") as file:
        file.truncate(len(data))
        for page in range(len(data) // PAGE):
            if page % 10 != 3:
                file.seek(page * PAGE)
                file.write(data[page * PAGE : (page + 1) * PAGE])
    return path


def compile_vmm(directory: Path) -> Path:
    """vmm.c."""
    binary = directory / "vmm"
    flags = ["-std=gnu11", "-O1", "-g", "-Wall", "-Wextra", "-Werror", "-pthread"]
    subprocess.run(["cc", *flags, HERE / "vmm.c", "-o", binary], check=True)
    return binary


class Vmm:
    """vmm.c: resumes by the handshake and does what it is told."""

    def __init__(self, binary: Path, path: Path, page_bytes: int = PAGE, *how: str) -> None:
        self.process = subprocess.Popen(
            [binary, path, str(SIZE_MIB), str(page_bytes), *how],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self.process.stdout is not None
        assert self.process.stdout.readline() == "handed over\n"

    def tell(self, *words: object) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(" ".join(map(str, words)) + "\n")
        self.process.stdin.flush()

    def do(self, *words: object) -> int:
        """A command's answer."""
        self.tell(*words)
        assert self.process.stdout is not None
        return int(self.process.stdout.readline())

    def waits_for_memory(self) -> bool:
        """Whether one of its threads sleeps in the kernel's handle_userfault()."""
        tasks = Path(f"/proc/{self.process.pid}/task").iterdir()
        return any((task / "wchan").read_text() == "handle_userfault" for task in tasks)

    def registered(self) -> int:
        """Mappings under a userfaultfd (proc(5): VmFlags um)."""
        text = Path(f"/proc/{self.process.pid}/smaps").read_text()
        return sum("um" in line.split() for line in text.splitlines() if line.startswith("VmFlags"))

    def end(self) -> None:
        """Of its own will."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        assert self.process.wait(SECONDS) == 0

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        for stream in (self.process.stdin, self.process.stdout):
            assert stream is not None
            stream.close()
