"""The file is a house in which every line knows its room: these are the house rules."""

import ast
import importlib.util
import os
import re

import pytest

PATH = os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "ctrl_exec.py")
with open(PATH, encoding="utf-8") as _file:
    SOURCE = _file.read()
LINES = SOURCE.split("\n")
TREE = ast.parse(SOURCE)
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)
SCOPES = (*FUNCTIONS, ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)

BANNER = re.compile(
    r"^# (={100,104})\n# (\d+)\. ([A-Z]+)\n((?:# Owns:  .*\n)(?:#        .*\n)*)# Uses:  (.*(?:\n#        .*)?)\n"
    r"(?:# (?:On disk|Why here): .*\n(?:#(?:   .*)?\n)*)*# \1\n",
    re.MULTILINE,
)
BANNERS = [  # (number, name, the line of its number, the sections that Uses: names)
    (int(hit[2]), hit[3], SOURCE.count("\n", 0, hit.start()) + 2, hit[5].replace("\n#       ", "")) for hit in BANNER.finditer(SOURCE)
]

# Where a library may be named, and which of its names; ANY of them where it is at home. HEAD only imports.
ANY = None
HOMES = {
    "ssl": {
        "HEAD": set(), "TRUST": ANY, "SERVER": ANY, "CLIENT": ANY,
        "GROUND": {"OPENSSL_VERSION"}, "CLI": {"OPENSSL_VERSION"},  # for bug reports and --version
        "OPENSSL": {"cert_time_to_seconds", "DER_cert_to_PEM_cert"},
        "AGENT": {"SSLContext", "MemoryBIO", "SSLError", "SSLWantReadError"},  # the handshake with itself
        "PAIRING": {"SSLContext"},
    },
    "subprocess": {"GROUND": ANY},
    "argparse": {"CLI": ANY},
    "ctypes": {"GROUND": ANY, "JOBS": ANY, "EXECUTOR": set()},  # prctl(2); EXECUTOR imports it once for all its children
    # while signing; the demo; GROUND imports it early for a process that gives up root
    "tempfile": {
        "OPENSSL": {"mkdtemp"}, "CLI": {"mkdtemp"}, "GROUND": set(), "MAIN": {"TemporaryDirectory"},
    },
}  # fmt: skip
FORBIDDEN = {"print", "pickle", "marshal", "shelve", "yaml", "eval", "exec", "compile", "__import__", "input"}


def section_of(line):
    """The name of the section that a line is in."""
    return next((name for _, name, start, _ in reversed(BANNERS) if start <= line), "the docstring")


def bound_names(node):
    """Names that the scope `node` binds for itself, not those of scopes inside it."""
    names, todo = set(), [node]
    while todo:
        one = todo.pop()
        if isinstance(one, (ast.FunctionDef, ast.ClassDef)) and one is not node:
            names.add(one.name)
        elif isinstance(one, ast.Name) and not isinstance(one.ctx, ast.Load):
            names.add(one.id)
        elif isinstance(one, ast.arg):
            names.add(one.arg)
        elif isinstance(one, ast.alias):
            names.add((one.asname or one.name).split(".")[0])
        elif isinstance(one, ast.ExceptHandler) and one.name:
            names.add(one.name)
        if one is node or not isinstance(one, (*SCOPES, ast.ClassDef)):
            todo.extend(ast.iter_child_nodes(one))
    return names


def find_uses(node, hidden=frozenset(), deferred=False):
    """(name, line, deferred) for each use of a name of the module; deferred: not run at import."""
    if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load) and node.id not in hidden:
        yield node.id, node.lineno, deferred
    if isinstance(node, FUNCTIONS):  # defaults, decorators and annotations belong to the scope around it
        inner = hidden | bound_names(node)
        body = node.body if isinstance(node.body, list) else [node.body]
        for child in ast.iter_child_nodes(node):
            inside = any(child is one for one in body)
            yield from find_uses(child, inner if inside else hidden, deferred or inside)
        return
    if isinstance(node, SCOPES):
        hidden = hidden | bound_names(node)
    for child in ast.iter_child_nodes(node):
        yield from find_uses(child, hidden, deferred)


def is_attribute(node, module, name=""):
    """Whether a node is `module.something`, or `module.name`."""
    if not isinstance(node, ast.Attribute) or not isinstance(node.value, ast.Name):
        return False
    return node.value.id == module and name in ("", node.attr)


def top_level_names():
    """Each name the module binds at top level, with the line where it first has a value."""
    found = {}
    for statement in TREE.body:
        if isinstance(statement, (ast.FunctionDef, ast.ClassDef)):
            found.setdefault(statement.name, statement.lineno)
        else:
            for name in bound_names(statement):
                found.setdefault(name, statement.lineno)
    return found


NAMES = top_level_names()
IMPORTS = [
    (node.lineno, (getattr(node, "module", None) or alias.name))
    for node in ast.walk(TREE)
    if isinstance(node, (ast.Import, ast.ImportFrom))
    for alias in node.names
]
USES = [(name, line, deferred) for name, line, deferred in find_uses(TREE) if name in NAMES]


def test_banners_have_one_form_and_stand_in_order():
    headings = [number for number, line in enumerate(LINES, 1) if re.match(r"# \d+\. [A-Z]+\s*$", line)]
    assert [line for _, _, line, _ in BANNERS] == headings
    rules = [number for number, line in enumerate(LINES, 1) if line.startswith("# =====")]
    assert len(rules) == 2 * len(BANNERS)
    numbers = [number for number, _, _, _ in BANNERS]
    assert numbers == sorted(set(numbers))


def test_the_map_in_the_docstring_is_the_list_of_banners():
    rows = re.findall(r"(?<!\S)(\d+) ([A-Z]+)  +(.*?)(?=   |$)", ast.get_docstring(TREE), re.MULTILINE)
    kept = {name for _, name, about in rows if "number is kept" in about}
    assert sorted((int(number), name) for number, name, _ in rows if name not in kept) == [
        (number, name) for number, name, _, _ in BANNERS
    ]
    assert sorted(int(number) for number, _, _ in rows) == list(range(1, len(rows) + 1))


def test_nothing_is_used_above_its_definition():
    assert [(name, line) for name, line, _ in USES if line < NAMES[name]] == []


def test_a_section_names_only_its_own_names_and_those_of_sections_above():
    order = [name for _, name, _, _ in BANNERS]
    assert [
        "line %d: %s names %s of %s" % (line, section_of(line), name, section_of(NAMES[name]))
        for name, line, _ in USES
        if order.index(section_of(NAMES[name])) > order.index(section_of(line))
    ] == []


@pytest.mark.parametrize("number, section, _, uses", BANNERS, ids=[row[1] for row in BANNERS])
def test_a_section_uses_exactly_the_sections_that_its_banner_lists(number, section, _, uses):
    listed = [] if uses == "nothing" else uses.split(", ")
    names = {}  # section used: one place where it is, for the message
    for name, line, _ in USES:
        used = section_of(NAMES[name])
        if section_of(line) == section != used:
            names.setdefault(used, "line %d: %s" % (line, name))
    assert {used: where for used, where in names.items() if used not in listed} == {}
    assert [one for one in listed if one not in names] == []
    above = [name for other, name, _, _ in BANNERS if other < number]
    assert [one for one in listed if one not in above] == []


def test_private_names_stay_in_their_section():
    assert [
        "line %d: %s names %s of %s" % (line, section_of(line), name, section_of(NAMES[name]))
        for name, line, _ in USES
        if re.match("_(?!_)", name) and section_of(line) != section_of(NAMES[name])
    ] == []


def test_only_the_standard_library_is_imported():
    found = {name.split(".")[0] for _, name in IMPORTS}
    home = os.path.dirname(os.__file__)
    specs = {name: importlib.util.find_spec(name) for name in found}
    origins = {name: getattr(spec, "origin", None) or "nowhere" for name, spec in specs.items()}
    assert {
        name: origin
        for name, origin in origins.items()
        if origin not in ("built-in", "frozen") and (not origin.startswith(home) or "-packages" in origin)
    } == {}


@pytest.mark.parametrize("version", [(3, 6), (3, 9)])
def test_the_file_parses_as_an_older_python_would(version):
    ast.parse(SOURCE, feature_version=version)


def test_the_version_is_checked_before_anything_but_sys_is_imported():
    docstring, first, check, *_ = TREE.body
    assert isinstance(docstring, ast.Expr) and ast.unparse(first) == "import sys"
    assert isinstance(check, ast.If) and ast.unparse(check.test) == "sys.version_info < (3, 9)"


@pytest.mark.parametrize("library", sorted(HOMES))
def test_a_library_is_named_only_at_home(library):
    allowed = HOMES[library]
    astray = [(line, name) for line, name in IMPORTS if name == library and section_of(line) not in allowed]
    for node in ast.walk(TREE):
        if is_attribute(node, library):
            names = allowed.get(section_of(node.lineno), set())
            if names is not ANY and node.attr not in names:
                astray.append((node.lineno, library + "." + node.attr))
        elif isinstance(node, ast.ImportFrom) and node.module == library:
            astray.append((node.lineno, "from %s import" % library))
    assert astray == []


def test_only_main_and_the_floor_check_leave_the_process():
    *_, imports = (node for node in TREE.body if isinstance(node, ast.Try))  # and what is not whole
    floor_check = TREE.body[2].lineno, imports.end_lineno
    found = [(line, name) for name, line, _ in find_uses(TREE) if name in ("SystemExit", "exit", "quit")]
    found += [(node.lineno, "sys.exit") for node in ast.walk(TREE) if is_attribute(node, "sys", "exit")]
    assert [
        (line, name)
        for line, name in found
        if section_of(line) != "MAIN" and not floor_check[0] <= line <= floor_check[1]
    ] == []


def test_nothing_prints_or_makes_code_from_data():
    assert [(line, name) for name, line, _ in find_uses(TREE) if name in FORBIDDEN] == []
    assert [(line, name) for line, name in IMPORTS if name.split(".")[0] in FORBIDDEN] == []


def test_no_global_statements():
    assert [node.lineno for node in ast.walk(TREE) if isinstance(node, ast.Global)] == []


@pytest.mark.parametrize("kind, cap", [(ast.FunctionDef, 60), (ast.ClassDef, 300)])
def test_functions_fit_a_screen_and_classes_an_idea(kind, cap):
    found = [(n.lineno, n.name, n.end_lineno - n.lineno + 1) for n in ast.walk(TREE) if isinstance(n, kind)]
    assert [one for one in found if one[2] > cap] == []


def test_no_line_is_longer_than_110_columns_or_ends_in_blanks():
    numbered = list(enumerate(LINES, 1))
    assert [(number, len(line)) for number, line in numbered if len(line) > 110] == []
    assert [number for number, line in numbered if line != line.rstrip() or "\t" in line] == []


def test_patterns_anchor_with_fullmatch_and_never_with_a_dollar():
    assigned = {}  # what a variable that is used as a pattern may hold
    for node in ast.walk(TREE):
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            assigned.setdefault(node.targets[0].id, []).append(node.value)
    texts = {}
    for node in ast.walk(TREE):
        if isinstance(node, ast.Call) and is_attribute(node.func, "re") and node.func.attr != "escape":
            first = node.args[0]
            for place in assigned.get(first.id, []) if isinstance(first, ast.Name) else [first]:
                parts = (part for part in ast.walk(place) if isinstance(part, ast.Constant))
                texts.update((part.lineno, part.value) for part in parts)
    escapes_and_classes = re.compile(r"\\.|\[\^?\]?(?:\\.|[^\]\\])*\]", re.DOTALL)
    assert len(texts) > 20
    assert {at: text for at, text in texts.items() if "$" in escapes_and_classes.sub("", str(text))} == {}
