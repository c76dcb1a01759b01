"""By this name dbt finds the project's plugin: it imports each installed module called dbt_*."""

from dbt.plugins import dbtPlugin


class PythonModelsPlugin(dbtPlugin):  # type: ignore[misc]
    """Lets a `type: postgres` profile run Python models."""

    def initialize(self) -> None:
        """Called by dbt for each command that loads a project."""
        from exporter.python_models import install

        install()


plugins = [PythonModelsPlugin]
