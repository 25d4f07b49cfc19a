"""Checking: one pattern file and one prompt file that are wrong in every way there is, and each fault with its line."""

from pathlib import Path

import pytest

from recursivemas import patterns
from recursivemas.checking import check
from recursivemas.errors import ConfigError
from recursivemas.patterns import Pattern

# A comment says what is to be found in its line.
WRONG_PATTERN = """\
name: wrong
stages:
  - [planner, rival, planner]     # 'stages' names a role twice: 'planner'
  - [critic, solver]
  - []                            # a stage without a role
  - [tool-caller]                 # 'tool-caller' cannot be a role & nobody reads what the role 'tool-caller' sends
  - [idle, hermit]                # nobody reads what the role 'idle' sends & nobody but itself reads .* 'hermit' sends
  - [deaf, mute]                  # what the role 'deaf' sends never reaches & what the role 'mute' sends never reaches
edges:
  - planner->critic
  - critic->sovler                # unknown role 'sovler': did you mean 'solver'
  - planner->critic               # an edge twice: planner->critic
  - solver planner                # cannot read the edge 'solver planner': write it as source->target
  - planner->rival
  - rival->planner                # 'planner' and 'rival' stand in one stage and read each other
  - hermit->hermit
  - deaf->mute
  - mute->deaf                    # 'deaf' and 'mute' stand in one stage and read each other
answers: [solver, critic]         # one role answers
answer: solver                    # unknown setting 'answer': did you mean 'answers'
mutual: maybe                     # 'mutual' is 'maybe'
name: again                       # 'name' is given twice, first in line 1
"""

PATTERN = """\
name: fine
stages: [[planner], [critic], [solver]]
edges: [planner->critic, critic->solver, solver->planner]
answers: solver
"""

WRONG_PROMPTS = """\
name: wrong
roles:                            # the role 'critic' has no templates
  planner:
    first: "{question}"
    later: |-                     # there is no slot {latents:solver}, so what 'solver' sends would be lost

      {question}
      # unknown slot 'nobody'. .* the pattern has no edge nobody->planner
      {latents:nobody}
      # '{latents: solver}' is not a slot; write {latents:ROLE}
      {latents: solver}
  critik:                         # unknown role 'critik': did you mean 'critic'
    always: "{question}"
  solver:                         # no template of the role 'solver' fits round 1 & no template .* fits later rounds
    last: "{questoin}{latents:critic}"     # unknown placeholder 'questoin': did you mean 'question'
    solo: "{latents:critic}"      # alone nobody sends anything
    alwys: "{question}"           # unknown setting 'roles.solver.alwys': did you mean 'roles.solver.always'
variants:
  short: {style: Brief.}
  long: {}                        # the variant 'long' lacks the word 'style'
  odd: {style: x, question: y}    # a variant may not redefine 'question'
"""


def expected(text: str) -> list[tuple[int, str]]:
    """Lines and parts of messages, from the comments; a comment of its own line is for the line after it."""
    found = []
    for number, line in enumerate(text.splitlines(), start=1):
        before, hash, comment = line.partition("# ")
        for part in comment.split(" & ") if hash else []:
            found.append((number + (not before.strip()), part.strip()))
    return found


def says(message: str, part: str) -> bool:
    """Whether the message has all pieces of the part, in order."""
    place = 0
    for piece in part.split(" .* "):
        place = message.find(piece, place)
        if place < 0:
            return False
    return True


def write(folder: Path, name: str, text: str) -> Path:
    """Without the comments in lines of their own, which would be a part of the text: they become blank lines."""
    file = folder / name
    file.write_text("".join("\n" if line.strip().startswith("# ") else f"{line}\n" for line in text.splitlines()))
    return file


def assert_found(findings: list, file: Path, text: str) -> None:
    """Just these: every fault that is expected has a finding in its line, and there is no other."""
    left = [finding for finding in findings if finding.file == str(file)]
    for line, part in expected(text):
        fitting = [each for each in left if each.line == line and says(each.message, part)]
        assert fitting, f"line {line}: '{part}' was not found in {[str(each) for each in left]}"
        left.remove(fitting[0])
    assert not left, [str(each) for each in left]


def test_every_fault_of_a_pattern_is_found_at_once(tmp_path: Path) -> None:
    file = write(tmp_path, "pattern.yaml", WRONG_PATTERN)
    assert_found(check(file), file, WRONG_PATTERN)


def test_every_fault_of_the_prompts_is_found_at_once(tmp_path: Path) -> None:
    pattern = write(tmp_path, "pattern.yaml", PATTERN)
    prompts = write(tmp_path, "prompts.yaml", WRONG_PROMPTS)
    findings = check(pattern, prompts)
    assert_found(findings, prompts, WRONG_PROMPTS)
    assert [each.file for each in findings] == [str(prompts)] * len(findings)


def test_faults_of_both_files_come_together_in_order(tmp_path: Path) -> None:
    pattern = write(tmp_path, "pattern.yaml", WRONG_PATTERN)
    prompts = write(tmp_path, "prompts.yaml", WRONG_PROMPTS)
    findings = check(pattern, prompts)
    assert findings == sorted(findings)
    assert {each.file for each in findings} == {str(pattern), str(prompts)}
    assert str(findings[0]) == f"{pattern}:3: {findings[0].message}"


def test_the_bundled_patterns_and_their_prompts_are_sound() -> None:
    names = [file.stem for file in patterns.BUNDLED.glob("*.yaml")]
    assert len(names) >= 5
    for name in names:
        assert check(name, name) == []
    for world in ("ward", "relay"):
        assert check("sequential", world) == []


def test_what_is_sound_can_be_loaded(tmp_path: Path) -> None:
    file = write(tmp_path, "pattern.yaml", PATTERN)
    assert check(file) == []
    assert Pattern.load(file).name == "fine"


@pytest.mark.parametrize(
    ("template", "lost"),
    [
        ({"always": "{question}{latents:critic}"}, None),
        ({"always": "{question}{latents:critic}", "last": "{question}"}, "solver.last"),
        ({"first": "{question}", "later": "{question}{latents:critic}"}, "solver.first"),
        ({"first": "{question}{latents:critic}", "always": "{question}"}, "solver.always"),
        # Never taken: there is a template for the first round, and one for all later ones.
        ({"first": "{latents:critic}", "later": "{latents:critic}", "always": "{question}"}, None),
    ],
)
def test_a_message_that_a_template_has_no_place_for_is_a_fault(
    tmp_path: Path, template: dict[str, str], lost: str | None
) -> None:
    roles = {
        "planner": {"first": "{question}", "later": "{latents:solver}"},
        "critic": {"always": "{latents:planner}"},
        "solver": template,
    }
    prompts = tmp_path / "prompts.yaml"
    prompts.write_text(f"name: x\nroles: {roles}\n".replace("'", '"'))
    findings = check("sequential", prompts)
    assert len(findings) == (lost is not None)
    if lost:
        assert (
            f"{lost}: there is no slot {{latents:critic}}, so what 'critic' sends would be lost" in findings[0].message
        )


def test_a_file_that_is_no_yaml_has_one_fault(tmp_path: Path) -> None:
    good = write(tmp_path, "good.yaml", PATTERN)
    for name, content, words in (
        ("bad.yaml", "name: x\nstages: [[a]\nanswers: a\n", "line 3: not valid YAML"),
        ("list.yaml", "- a\n", "expected a mapping"),
        ("empty.yaml", "", "expected a mapping"),
        ("loop.yaml", "name: x\nstages: &a [*a]\nanswers: x\n", "no role acts"),
    ):
        file = write(tmp_path, name, content)
        assert any(words in str(each) for each in check(file)), name
        assert any(words in str(each) for each in check(good, file)) or name == "loop.yaml"
    [missing] = check(tmp_path / "none.yaml")
    assert str(missing) == f"there is no file {tmp_path / 'none.yaml'}"
    with pytest.raises(ConfigError, match="did you mean 'mixture'"):
        check("mixtur")
