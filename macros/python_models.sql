{% materialization table, adapter='postgres', supported_languages=['sql', 'python'] %}
    {{ return(dbt.materialization_table_default()) }}
{% endmaterialization %}


{% materialization incremental, adapter='postgres', supported_languages=['sql', 'python'] %}
    {{ return(dbt.materialization_incremental_default()) }}
{% endmaterialization %}


{% macro python_model_sql() %}
    {%- if adapter.run_python_model is not defined -%}
        {{ exceptions.raise_compiler_error(
            'Python models on Postgres need the package dbt-exporter beside dbt-core 1.10 to 1.12: pip install dbt-exporter'
        ) }}
    {%- endif -%}
    {{ return(adapter.run_python_model(model, compiled_code)) }}
{% endmacro %}


{#- `dbt show`, whose query is the model's code -#}
{% macro postgres__get_limit_sql(sql, limit) %}
    {%- if model.language == 'python' -%}
        {%- set sql = dbt_exporter.python_model_sql() -%}
    {%- endif -%}
    {{ dbt.default__get_limit_sql(sql, limit) }}
{% endmacro %}
