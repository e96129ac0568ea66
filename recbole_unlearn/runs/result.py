"""What `run_unlearn` gives back."""

from typing import Any

from recbole_unlearn.reports import tables


class Result(dict[str, Any]):
    """Figures of a run by name, as plain values; ``files`` (name -> path) is there always.

    Of a model that forgot (``kind`` is 'run'): ``models`` (original, unlearned, retrained: ranking metrics,
    forget_auc, seconds; exposure of spam; with ``evaluate: none`` seconds only), ``forget_set``, ``unlearning`` (solver
    report), ``guard`` (whether the log tells the training), ``paired`` (with ``compare: paired``:
    see `forgetting.paired`), ``stream`` (of requests), ``speed_up``, ``verdict``,
    ``settings``. Of 'fidelity': ``fidelity`` and ``title``; of a 'comparison': ``comparison`` (see
    `figures.Comparison.run`) and ``title``; of an 'audit': ``audit`` (see `populations.Audit.run`) and ``title``.
    """

    def __init__(self, kind: str, values: dict[str, Any], page: str | None = None):
        super().__init__({"files": {}, **values, **({} if page is None else {"page": page})})
        self.kind = kind

    @property
    def page(self) -> str:
        """The result as Markdown."""
        if self.kind == "run":
            return tables.markdown(self)
        if self.kind == "fidelity":
            return tables.fidelity_markdown(self["fidelity"], self["title"])
        return self["page"]
