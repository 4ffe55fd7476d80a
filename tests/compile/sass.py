"""What the assembler made of a kernel: its registers, and where it spills them."""

import re
import subprocess
from pathlib import Path

import triton

BIN = Path(triton.__file__).parent / "backends/nvidia/bin"
LABEL = re.compile(r"^\s*(\.L\w+):")
INSTRUCTION = re.compile(r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:(@\S+)\s+)?([^;]+);")
TARGET = re.compile(r"\(?(\.L\w+)\)?")


def resources(cubin: Path) -> tuple[int, int]:
    """(registers, bytes of stack) of a thread."""
    dump = subprocess.check_output([BIN / "cuobjdump", "--dump-resource-usage", cubin], text=True)
    registers, stack, local = re.search(r"REG:(\d+) STACK:(\d+) .*?LOCAL:(\d+)", dump).groups()
    return int(registers), int(stack) + int(local)


def spills_in_loops(cubin: Path) -> list[str]:
    """The instructions that load or store spilled registers inside of a loop."""
    code, edges = _graph(subprocess.check_output([BIN / "nvdisasm", "-c", cubin], text=True))
    return [code[i] for i in sorted(_on_circles(edges)) if re.match(r"(LDL|STL)\b", code[i])]


def _graph(text: str) -> tuple[list[str], list[list[int]]]:
    """Instructions, and for each the numbers of those that may follow it.

    Warps of a warp-specialised program wait in a loop for the part that they are to run. Each part begins
    and ends with a change of the number of registers; nothing follows that one here, so that this loop does
    not count.
    """
    code, predicated, labels = [], [], {}
    for line in text.splitlines():
        if found := LABEL.match(line):
            labels[found[1]] = len(code)
        elif found := INSTRUCTION.match(line):
            predicated.append(found[1] is not None)
            code.append(found[2].strip())
    edges = []
    for i, instruction in enumerate(code):
        name = instruction.split()[0]
        following = []
        if not name.startswith("USETMAXREG"):
            following = [labels[label] for label in TARGET.findall(instruction) if label in labels]
            ends = name in ("BRA", "EXIT") or name.startswith(("RET", "BRX"))
            if (not ends or predicated[i] or instruction.startswith("BRA U")) and i + 1 < len(code):
                following.append(i + 1)
        edges.append(following)
    return code, edges


def _on_circles(edges: list[list[int]]) -> set[int]:
    """Nodes from which a path leads back to them: Tarjan's strongly connected components, iteratively."""
    order, lowest, stack, on_stack, circles = {}, {}, [], set(), set()
    for root in range(len(edges)):
        if root in order:
            continue
        work = [(root, 0)]
        while work:
            node, edge = work.pop()
            if node not in order:
                order[node] = lowest[node] = len(order)
                stack.append(node)
                on_stack.add(node)
            for at in range(edge, len(edges[node])):
                other = edges[node][at]
                if other not in order:
                    work += [(node, at), (other, 0)]
                    break
                if other in on_stack:
                    lowest[node] = min(lowest[node], lowest[other])
            else:
                if lowest[node] == order[node]:
                    members = []
                    while not members or members[-1] != node:
                        members.append(stack.pop())
                        on_stack.discard(members[-1])
                    if len(members) > 1 or node in edges[node]:
                        circles.update(members)
    return circles
