"""The tasks in which a model writes, as declarations: mathematics and code."""

from pared.data.data_sets import GSM8K_TEST, GSM8K_TRAIN, MATH500, MBPP, DataSet
from pared.data.hub import HubSet
from pared.evaluation.answers import boxed, last_number, marked_number, same_expression, same_number
from pared.evaluation.sandbox import Program, definitions, used_names
from pared.evaluation.task import Groups, Row, Task, Verdict
from pared.names import require_known


def task_of(name: str) -> Task:
    """Return a task by name.

    Raises:
        ParedError: there is none.
    """
    require_known("task", name, TASKS)
    return TASKS[name]


def _question(row: Row) -> str:
    return f"Question: {row.get('question', row.get('context'))}\nAnswer:"


def _svamp(row: Row) -> Row:
    """Return a row of the Hub as the file has it: the story and its question are one text."""
    return {"context": f"{row['Body']} {row['Question']}", "answer": row["Answer"]}


def _gsm8k(row: Row, text: str) -> Verdict:
    right = marked_number(row["answer"])
    return {
        "exact_match": same_number(marked_number(text), right),
        "last_number": same_number(last_number(text), right),
    }


def _solved_problem(row: Row) -> Row:
    """Return a row of the Hub with its answer, which is what its solution boxes."""
    return {**row, "answer": boxed(row["solution"])}


def _subject_and_level(row: Row) -> Groups:
    """Return what a problem of MATH belongs to, as far as its row says, written one way."""
    named = {"subject": next((row[name] for name in ("subject", "type", "category") if row.get(name)), None),
             "level": row.get("level")}  # fmt: skip
    return {kind: str(name).lower().replace("&", "and").replace("level ", "").replace(" ", "_")
            for kind, name in named.items() if name is not None}  # fmt: skip


def _math(name: str, data: DataSet) -> Task:
    return Task(
        name=name,
        data=data,
        fields={"problem": str, "solution": str, "answer": str},
        prompt=lambda row: f"Problem:\n{row['problem']}\n\nSolution:",
        answer=lambda row: f" {row['solution']}",
        stop=("Problem:",),
        tokens=512,
        judge=lambda row, text: {"equivalent": same_expression(boxed(text), row["answer"])},
        symbolic=lambda row: f"\\boxed{{{row['answer']}}}",
        groups=_subject_and_level,
    )


def _humaneval(row: Row, text: str) -> Program:
    tests = f"{row['test']}\ncheck({row['entry_point']})\n"
    given = definitions(row["prompt"])
    return Program(f"{row['prompt']}{text}\n", tests, given, calls=(str(row["entry_point"]),))


def _mbpp(row: Row, text: str) -> Program:
    tests = "\n".join([row.get("test_setup_code", ""), *row["test_list"], ""])
    imports, calls = used_names(row["code"], tests)
    return Program(text, tests, given=imports, calls=calls)


def _mbpp_prompt(row: Row) -> str:
    tests = "\n".join(row["test_list"])
    return (
        f"You are an expert Python programmer, and here is your task: {row['text']} Your code should pass these tests:"
        f"\n\n{tests}\n[BEGIN]\n"
    )


MATH_SUBJECTS = ("algebra", "counting_and_probability", "geometry", "intermediate_algebra", "number_theory",
                 "prealgebra", "precalculus")  # fmt: skip
MATH = DataSet(
    "math/math_test.jsonl",
    HubSet("EleutherAI/hendrycks_math", MATH_SUBJECTS, "test"),
    ("problem", "solution"),
    _solved_problem,
)
TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        Task(
            name="gsm8k",
            data=GSM8K_TEST,
            fields={"question": str, "answer": str},
            right=lambda row: marked_number(row["answer"]),
            prompt=_question,
            answer=lambda row: f" {row['answer']}",
            stop=("Question:", "\n\n\n"),
            tokens=256,
            judge=_gsm8k,
            symbolic=lambda row: str(marked_number(row["answer"])),
            shots_data=GSM8K_TRAIN,
            shots=5,
        ),
        Task(
            name="svamp",
            data=DataSet(
                "math/svamp_test.jsonl",
                HubSet("ChilleD/SVAMP", split="test"),
                ("Body", "Question", "Answer"),
                _svamp,
            ),
            fields={"context": str, "answer": (str, int, float)},
            right=lambda row: last_number(str(row["answer"])),
            prompt=_question,
            answer=lambda row: f" {row['answer']}",
            stop=("Question:", "\n\n\n"),
            tokens=256,
            judge=lambda row, text: {"last_number": same_number(last_number(text), last_number(str(row["answer"])))},
            symbolic=lambda row: str(last_number(str(row["answer"]))),
        ),
        _math("math500", MATH500),
        _math("math", MATH),
        Task(
            name="humaneval",
            data=DataSet("code/HumanEval.jsonl", HubSet("openai/openai_humaneval", split="test")),
            fields={"prompt": str, "test": str, "entry_point": str},
            prompt=lambda row: str(row["prompt"]),
            answer=lambda row: str(row["canonical_solution"]),
            stop=("\nclass ", "\ndef ", "\n#", "\nif ", "\nprint(", "\n@"),
            tokens=512,
            program=_humaneval,
        ),
        Task(
            name="mbpp",
            data=MBPP,
            fields={"text": str, "code": str, "task_id": int, "test_list": list},
            prompt=_mbpp_prompt,
            answer=lambda row: f"{row['code']}\n[DONE]",
            stop=("[DONE]", "\nYou are an expert"),
            tokens=512,
            program=_mbpp,
            chosen=lambda row: 11 <= row["task_id"] <= 510,  # the authors' test part
            shown=lambda row: 2 <= row["task_id"] <= 4,  # and the examples they show
            shots=3,
        ),
    )
}
