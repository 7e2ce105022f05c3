"""MLflow stores on SQLite, read with sqlite3 and not through the code under test."""

import sqlite3
from pathlib import Path


class Store:
    """An MLflow store of the test's own, and what is in it."""

    def __init__(self, folder: Path) -> None:
        self.db = folder / "mlflow.db"
        self.uri = f"sqlite:///{self.db}"
        self.artifacts = folder / "mlartifacts"

    def rows(self, query, *args):
        with sqlite3.connect(self.db) as connection:
            return connection.execute(query, args).fetchall()

    def points(self, run_id):
        return self.rows("SELECT key, step, value, is_nan FROM metrics WHERE run_uuid = ? ORDER BY key, step", run_id)

    def steps(self, run_id, key="train/loss"):
        return [step for k, step, _, _ in self.points(run_id) if k == key]

    def tags(self, run_id):
        return dict(self.rows("SELECT key, value FROM tags WHERE run_uuid = ?", run_id))

    def params(self, run_id):
        return dict(self.rows("SELECT key, value FROM params WHERE run_uuid = ?", run_id))

    def status(self, run_id):
        return self.rows("SELECT status FROM runs WHERE run_uuid = ?", run_id)[0][0]

    def runs(self):
        return [run_id for (run_id,) in self.rows("SELECT run_uuid FROM runs ORDER BY start_time")]

    def files(self, run_id):
        root = self.artifacts / run_id / "artifacts"
        return sorted(str(path.relative_to(root)) for path in root.rglob("*") if path.is_file())
