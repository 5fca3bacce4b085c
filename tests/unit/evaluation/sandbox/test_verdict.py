"""No wrong program passes: it sees arguments, never the tests, and its word is plain data."""

import pytest
from evaluation.sandbox.hostile import POSIX, run

from pared.evaluation.sandbox import Program, definitions, used_names
from pared.evaluation.sandbox.run import WALLS

pytestmark = POSIX
TESTS = """
def check(candidate):
    assert candidate(1) == 2
    assert abs(candidate(41) - 42) < 1e-6
    assert set([candidate(5)]) == {6}
check(f)
"""

WRONG = {
    "says nothing": "def f(x): pass",
    "equals everything": """
class Any:
    def __eq__(self, other): return True
    def __hash__(self): return hash(6)
    __sub__ = __rsub__ = __abs__ = lambda *_: Any()
    __lt__ = __gt__ = __le__ = __ge__ = lambda *_: True
def f(x): return Any()
""",
    "an integer of its own": """
class Whole(int):
    def __eq__(self, other): return True
    def __hash__(self): return 6
    def __sub__(self, other): return Whole(0)
def f(x): return Whole(7)
""",
    "claims another class": """
class Mask:
    __class__ = int
    def __eq__(self, other): return True
def f(x): return Mask()
""",
    "changes builtins": """
import builtins
builtins.abs = lambda x: 0
builtins.set = lambda x: {6}
builtins.AssertionError = Exception
builtins.__build_class__ = None
def f(x): return 2
""",
    "defines the tests itself": "check = lambda candidate: None\nabs = lambda x: 0\nset = lambda x: {6}\nf = abs",
    "traces lines away": """
import sys
def jump(frame, event, arg):
    if event == "line":
        try: frame.f_lineno += 1
        except ValueError: pass
    return jump
sys.settrace(jump)
sys.setprofile(lambda *_: None)
def f(x): return 2
""",
    "changes the frames above": """
import sys
def f(x):
    frame = sys._getframe()
    while frame:
        for name in list(frame.f_locals): frame.f_globals[name] = lambda *_: True
        frame = frame.f_back
    return 2
""",
    "looks for what is expected among all objects": """
import gc
def f(x):
    wanted = "".join(reversed("2 == )1(etadidnac"))  # not to find itself
    known = [o for o in gc.get_objects() if isinstance(o, (dict, list, tuple)) and wanted in repr(o)[:100000]]
    return x + 1 if known else None
""",
    "looks for the tests in its files, descriptors and memory": """
import os
def f(x):
    found = b""
    for folder, _, names in os.walk("."):
        found += b"".join(open(os.path.join(folder, n), "rb").read() for n in names if n != "program.py")
    for number in range(64):
        try:
            os.set_blocking(number, False)
            found += os.read(number, 1 << 20) if number != 3 else b""
        except OSError: pass
    try: found += open("/proc/self/cmdline", "rb").read() + open("/proc/self/environ", "rb").read()
    except OSError: pass
    return x + 1 if b"candidate(41)" in found else None
""",
    "writes a verdict everywhere": """
import json, os
word = json.dumps({"passed": True, "why": "", "output": "", "without": []}).encode()
for number in range(64):
    for text in (word, len(word).to_bytes(4, "big") + word):
        try: os.write(number, text)
        except OSError: pass
""",
    "says by itself that it ran": """
import json, os
for message in ({"ready": True}, {"value": 2}, {"value": True}, {"value": {"ref": 0}}):
    text = json.dumps(message).encode()
    os.write(3, len(text).to_bytes(4, "big") + text)
os._exit(0)
""",
    "answers out of shape": """
import json, os
for message in ({"ready": True}, {"value": {"evil": 1}}, [], 7):
    text = json.dumps(message).encode()
    os.write(3, len(text).to_bytes(4, "big") + text)
""",
    "sends handles that look like numbers": """
import json, os
for message in ({"ready": True}, {"value": {"ref": {"a": 1}}}):
    text = json.dumps(message).encode()
    os.write(3, len(text).to_bytes(4, "big") + text)
""",
    "ends with every status": "import os\nfor n in range(256):\n    if os.fork() == 0: os._exit(n)\nos._exit(65)",
    "ends in the middle": "import os\ndef f(x): os._exit(0)",
    "leaves by an exception": "def f(x): raise SystemExit(0)",
    "leaves an exit handler": """
import atexit, os
atexit.register(lambda: os._exit(0))
raise SystemExit(0)
""",
    "leaves a thread": """
import os, threading, time
def later():
    time.sleep(0.2)
    os._exit(0)
threading.Thread(target=later).start()
def f(x): return 2
""",
    "kills those above": """
import os, signal
for pid in {os.getppid(), 1} - {0}:
    try: os.kill(pid, signal.SIGKILL)
    except OSError: pass
def f(x): return 2
""",
    "changes its channel's words": """
import sys
for name, module in list(sys.modules.items()):
    if name.startswith("sandbox"):
        for word in list(vars(module)): setattr(module, word, lambda *_, **__: True)
def f(x): return 2
""",
    "changes its own file": "open('program.py', 'w').write('def f(x): return x + 1')\ndef f(x): return 2",
    "returns itself": "def f(x): return f",
    "returns what it was given, changed": "def f(x): return [x + 1]",
    "returns not a number": "def f(x): return float('nan')",
    "returns forever": "def f(x):\n    while True: yield x + 1",
}


@pytest.mark.parametrize("source", WRONG.values(), ids=[name.replace(" ", "-") for name in WRONG])
def test_a_wrong_program_fails(source: str) -> None:
    ran = run(Program(source, TESTS, calls=("f",)))
    assert not ran.passed, ran


@pytest.mark.parametrize("walls", [WALLS, ()], ids=["walls", "bare"])
def test_a_right_program_passes_with_or_without_walls(walls: tuple[str, ...]) -> None:
    ran = run(Program("def f(x): return x + 1", TESTS, calls=("f",)), walls=walls)
    assert ran.passed, ran


def test_values_keep_their_kinds_and_arguments_that_are_changed_are_changed() -> None:
    source = """
import collections, decimal, fractions, re
def f(x): return x
def more(xs): xs.append(4); xs.sort()
def many(): return (1, [2.5, {3: None}], {4}, frozenset({5}), b"6", 7j, 10**30, -(10**30), 1e999, "\\ud800", True)
def own(): return collections.Counter("aab"), collections.namedtuple("P", "x y")(1, 2), fractions.Fraction(1, 3)
class Node:
    def __init__(self, x): self.x, self.next = x, None
def total(node): return node.x + (total(node.next) if node.next else 0)
def matched(): return re.match("a", "b")
def found(): return re.match("a", "a")
def steps(): yield from range(3)
def wrong(): raise KeyError("k")
"""
    tests = """
values = (1, [2.5, {3: None}], {4}, frozenset({5}), b"6", 7j, 10**30, -(10**30), 1e999, "\\ud800", True)
assert many() == values and f(values) == values and [type(one) for one in many()] == [type(one) for one in values]
xs = [3, 2]
assert more(xs) is None and xs == [2, 3, 4]
assert own() == ({"a": 2, "b": 1}, (1, 2), __import__("fractions").Fraction(1, 3))
node = Node(1)
node.next = Node(2)
assert total(node) == 3 and node.next.x == 2 and node.next is node.next
assert matched() is None and found() and list(steps()) == [0, 1, 2] and f(x=3) == 3
try: wrong()
except KeyError: pass
else: raise AssertionError
"""
    calls = ("f", "more", "many", "own", "Node", "total", "matched", "found", "steps", "wrong")
    ran = run(Program(source, tests, calls=calls))
    assert ran.passed, ran


def test_tests_use_their_own_definitions_and_the_programs_where_they_are_named() -> None:
    given = "def helper(x): return 2 * x\ndef f(x): pass"
    program = Program("def helper(x): return 0\ndef f(x): return x", "assert helper(f(3)) == 6", given, ("f",))
    assert run(program).passed


def test_names_of_a_solution_are_told_from_pythons_own() -> None:
    solution = "import math\ndef sum(a): return a\nclass Pair: pass\ndef unused(): pass\nA, B = 1, 2"
    tests = "assert sum(abs(1)) == math.floor(Pair(A).x)"
    assert used_names(solution, tests) == ("import math", ("A", "Pair", "sum"))
    assert used_names("print 'of Python 2'", tests) == ("", ())


def test_a_prompt_defines_what_stands_before_its_last_body() -> None:
    helper = "def helper(x):\n    return x\n\n"
    assert "helper" in definitions(f"{helper}def f(x):\n    'what it does'\n")
    assert definitions(f"{helper}def f(x):\n").endswith("def f(x):\n    pass\n")
    assert definitions("print 'of Python 2'") == ""
