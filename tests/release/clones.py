"""A stand-in for a clone of the authors' code: functions of the same names and parameters, with words of our own."""

from pathlib import Path

NOTES = "SYSTEM = 'You have a python tool.'\n"

PROMPTS = """
import re
from inference_utils.notes import SYSTEM

print("noise on stdout")
SYSTEM_PROMPT = "You help."
PLANNER_SLOT, REFINED_SLOT, FEEDBACK_SLOT = "<<P>>", "<<R>>", "<<F>>"
HIE_MATH_EXPERT_SLOT, HIE_CODE_EXPERT_SLOT, HIE_SCIENCE_EXPERT_SLOT = "<<M>>", "<<C>>", "<<S>>"
HIE_FEEDBACK_SLOT = "<<HF>>"
DISTILL_EXPERT_SLOT, DISTILL_FEEDBACK_SLOT = "<<E>>", "<<DF>>"
DELIBERATION_REFLECTOR_SLOT, DELIBERATION_FEEDBACK_SLOT = "<<RS>>", "<<TF>>"


def get_system_prompt(mas_design="chain", mas_role=None):
    return SYSTEM if mas_design == "deliberation" else SYSTEM_PROMPT


def asks_for_a_letter(question, mas_task="math"):
    return mas_task == "choice" or re.search(r"(?m)^[A-D]\\\\. ", question)


def ending(question, mas_task="math"):
    if mas_task == "code":
        return "Code:"
    return r"Box it: \\\\boxed{A}." if asks_for_a_letter(question, mas_task) else r"Box it: \\\\boxed{}."


def interface(task_type, fn_name=None):
    return "A function {only}." if task_type == "function" else "A program."


def build_math_planner_prompt(question):
    return f"Plan, {{briefly}}.\\\\n{question}\\\\nPlan:"


def build_math_planner_prompt_with_feedback_slot(question):
    return f"Plan again.\\\\n{question}\\\\nFeedback: {FEEDBACK_SLOT}\\\\nPlan:"


def build_math_refiner_prompt_with_slot(question):
    return f"Refine {PLANNER_SLOT} for\\\\n{question}"


def build_math_solver_prompt_with_slots(question, args=None, mas_shape="chain"):
    return f"By {REFINED_SLOT} solve\\\\n{question}\\\\n\\\\n{ending(question)}"


def build_code_planner_prompt(question, task_type, fn_name=None):
    return f"{interface(task_type)}\\\\n{question}"


def build_code_planner_prompt_with_feedback_slot(question, task_type, fn_name=None):
    return f"{interface(task_type)}\\\\n{question}\\\\n{FEEDBACK_SLOT}"


def build_code_refiner_prompt_with_slot(question, task_type, fn_name=None):
    return f"{PLANNER_SLOT} {interface(task_type)}\\\\n{question}"


def build_code_solver_prompt_with_slots(question, task_type, args=None, mas_shape="chain", fn_name=None):
    return f"{REFINED_SLOT} {interface(task_type)}\\\\n{question}\\\\n{ending(question, 'code')}"


def context(question, mas_task):
    return f"Q: {question}\\\\n" + ("A letter.\\\\n" if mas_task == "choice" else "")


def build_hie_expert_prompt(question, hie_role, mas_task="math", task_type="complete", fn_name=None):
    return f"{hie_role} says.\\\\n{context(question, mas_task)}"


def build_hie_expert_prompt_with_feedback_slot(question, hie_role, mas_task="math", task_type="complete", fn_name=None):
    return f"{hie_role} hears {HIE_FEEDBACK_SLOT}.\\\\n{context(question, mas_task)}"


def build_hie_summarizer_prompt_with_slots(question, mas_task="math", task_type="complete", fn_name=None):
    heard = f"{HIE_MATH_EXPERT_SLOT} {HIE_CODE_EXPERT_SLOT} {HIE_SCIENCE_EXPERT_SLOT}"
    return f"{heard}\\\\n{context(question, mas_task)}{ending(question, mas_task)}"


def build_distill_expert_prompt(question, mas_task="math", task_type="complete", fn_name=None):
    return f"{context(question, mas_task)}Guide."


def build_distill_expert_prompt_with_feedback_slot(question, mas_task="math", task_type="complete", fn_name=None):
    return f"{DISTILL_FEEDBACK_SLOT}\\\\n{context(question, mas_task)}Guide."


def build_distill_learner_prompt_with_slot(question, mas_task="math", task_type="complete", fn_name=None):
    return f"{DISTILL_EXPERT_SLOT}\\\\n{context(question, mas_task)}{ending(question, mas_task)}"


def build_deliberation_reflector_prompt(question, mas_task="math", task_type="complete", fn_name=None):
    return f"Reflect.\\\\n{context(question, mas_task)}"


def build_deliberation_reflector_prompt_with_feedback_slot(question, mas_task="math", task_type="complete", fn_name=None):
    return f"{DELIBERATION_FEEDBACK_SLOT}\\\\n{context(question, mas_task)}"


def build_deliberation_toolcaller_prompt_with_slot(question, mas_task="math", task_type="complete", fn_name=None):
    return f"{DELIBERATION_REFLECTOR_SLOT}\\\\n{context(question, mas_task)}{ending(question, mas_task)}"
""".replace("\\\\", "\\")


def write_clone(place: Path, *, below: str = "", changes: dict[str, str] | None = None) -> Path:
    """The stand-in on disk, with pieces of its text exchanged; the prompts are in the folder `below`."""
    text = PROMPTS
    for old, new in (changes or {}).items():
        assert old in text
        text = text.replace(old, new)
    folder = place / below
    (folder / "inference_utils").mkdir(parents=True)
    (folder / "inference_utils" / "notes.py").write_text(NOTES)
    (folder / "prompts.py").write_text(text)
    return place
