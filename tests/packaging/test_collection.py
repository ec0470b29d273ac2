"""How `make test` draws from long lists of cases; `make test-slow` runs the others."""

from tests.conftest import DRAWN, beyond_the_draw


def test_a_short_list_is_whole() -> None:
    assert beyond_the_draw([f"test_a[{k}]" for k in range(DRAWN)] + ["test_b", "test_c[0]"]) == set()


def test_of_a_long_list_as_many_are_drawn_from_all_over_it() -> None:
    cases = [f"test_a[{k}]" for k in range(1000)]
    others = beyond_the_draw([*cases, "test_b[0]"])
    drawn = [k for k in range(1000) if f"test_a[{k}]" not in others]
    assert len(drawn) == DRAWN and others <= set(cases)
    assert all(any(100 * part <= k < 100 * (part + 1) for k in drawn) for part in range(10))


def test_a_list_of_thousands_is_cut_and_the_quick_draw_is_in_it() -> None:
    cases = [f"test_a[{k}]" for k in range(3000)]
    cut, slow = beyond_the_draw(cases, 800), beyond_the_draw(cases)
    assert len(set(cases) - cut) == 800
    assert set(cases) - slow <= set(cases) - cut


def test_the_same_are_drawn_in_any_order() -> None:
    cases = [f"test_a[{k}]" for k in range(1000)]
    assert beyond_the_draw(cases) == beyond_the_draw(reversed(cases))
