"""What tests take from a program, by the solution that they were written for."""

import ast


def used_names(solution: str, tests: str) -> tuple[str, tuple[str, ...]]:
    """Return the imports of a solution, and which of the names it defines its tests use.

    A test that calls ``sum`` or ``math.floor`` means Python's own, unless the solution defines that name.

    Args:
        solution: a right one, which need not be the program that is judged.
        tests: statements that use it.

    Returns:
        The import statements at its top, and names, sorted; nothing of a solution that is no Python 3.
    """
    try:
        top, used = ast.parse(solution).body, ast.walk(ast.parse(tests))
    except SyntaxError:
        return "", ()
    imports = [ast.unparse(one) for one in top if isinstance(one, (ast.Import, ast.ImportFrom))]
    defined = {one.name for one in top if isinstance(one, (ast.FunctionDef, ast.ClassDef, ast.AsyncFunctionDef))}
    for one in top:
        for target in one.targets if isinstance(one, ast.Assign) else ():
            defined |= {name.id for name in ast.walk(target) if isinstance(name, ast.Name)}
    names = {one.id for one in used if isinstance(one, ast.Name)}
    return "\n".join(imports), tuple(sorted(defined & names))


def definitions(prompt: str) -> str:
    """Return what a prompt defines that ends where a function's body begins; nothing of one that is no Python 3."""
    for text in (prompt, f"{prompt.rstrip()}\n    pass\n"):
        try:
            ast.parse(text)
        except SyntaxError:
            continue
        return text
    return ""
