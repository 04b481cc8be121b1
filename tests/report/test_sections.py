from lit_prune.report.plain import to_plain
from lit_prune.report.sections import CutSummary, Sparsity
from tests.report.reports import CUT


def test_a_cut_says_first_what_was_requested_of_it() -> None:
    summary = CutSummary.of(CUT)
    assert next(iter(to_plain(summary).items())) == ("requested", 0.5)
    assert (summary.step, summary.perplexity, summary.rates) == (4, {"before": 20.0, "after": 60.0}, [0.4, 0.6])


def test_a_share_that_is_not_known_is_left_out() -> None:
    assert to_plain(Sparsity(requested=None, achieved_linears=0.0)) == {"requested": None, "achieved_linears": 0.0}
    assert to_plain(Sparsity(requested=0.5, before=0.25))["before"] == 0.25
