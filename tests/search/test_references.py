"""The base, the experts alone and the published settings."""

from searchmerge.search.references import BASE, expert_name, merges, reference_plans


def test_every_expert_is_a_reference_and_no_merge():
    references = reference_plans(("math", "code"))
    assert list(references) == [
        "base", "expert math", "expert code", "average", "task arithmetic", "TIES", "PCB",
    ]  # fmt: skip
    assert references[BASE].values == {"coefficient": ((0.0, 0.0),)}
    assert references[expert_name("code")].values == {"coefficient": ((0.0, 1.0),)}
    assert [plan.method for plan in merges(references)] == [
        "linear", "task_arithmetic", "ties", "pcb",
    ]  # fmt: skip


def test_published_settings_are_those_of_the_papers():
    references = reference_plans(("math", "code"))
    assert references["task arithmetic"].values["coefficient"] == ((0.4, 0.4),)
    assert references["TIES"].values == {"coefficient": ((1.0, 1.0),), "density": ((0.2, 0.2),)}
    assert references["PCB"].values == {"coefficient": ((1.0, 1.0),), "density": ((0.1, 0.1),)}
