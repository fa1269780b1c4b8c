"""Files to files: a corpus of any size through a model, in shards, resumable.

    from bertjax.corpus import Job, SentenceVectors, run

    job = Job(inputs=("texts/*.parquet",), out="vectors", work=SentenceVectors("MODEL"), text=("body",), id="id")
    summary = run(job)

Needs pyarrow (the extra `corpus`).
"""

try:
    import pyarrow  # noqa: F401
except ImportError:
    from bertjax.errors import SourceError

    raise SourceError("pyarrow is needed to read and write files of a corpus: pip install 'bertjax[corpus]'") from None

from bertjax.corpus.compute import TableComputer
from bertjax.corpus.job import Job, Plan
from bertjax.corpus.run import Summary, plan, run
from bertjax.corpus.sentences import SentenceVectors
from bertjax.corpus.tasks import Entities, Labels, PairScores, SparseVectors

__all__ = [
    "Entities",
    "Job",
    "Labels",
    "PairScores",
    "Plan",
    "SentenceVectors",
    "SparseVectors",
    "Summary",
    "TableComputer",
    "plan",
    "run",
]
