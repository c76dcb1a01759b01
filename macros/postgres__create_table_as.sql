{% macro postgres__create_table_as(temporary, relation, sql) -%}
    {%- if temporary or config.get('materialized') != 'incremental' or config.get('incremental_strategy') != 'upsert' -%}
        {{ return(dbt.postgres__create_table_as(temporary, relation, sql)) }}
    {%- endif -%}
    {#- dbt runs no strategy on the first build and on a full refresh -#}
    {%- set options = dbt_exporter.upsert_options(get_column_schema_from_query(sql, config.get('sql_header'))) -%}
    {%- set declared = [] -%}
    {%- for index in config.get('indexes') or [] if index.get('unique') -%}
        {%- set columns = [] -%}
        {%- for column in index['columns'] -%}
            {%- do columns.append('"' ~ column.strip('"') ~ '"') -%}
        {%- endfor -%}
        {%- if columns | sort == options['keys'] | sort -%}
            {%- do declared.append(index) -%}
        {%- endif -%}
    {%- endfor -%}
    {{ dbt.postgres__create_table_as(false, relation, dbt_exporter.upsert_kept_sql(sql, options)) }}
    {{ dbt_exporter.upsert_check_sql(relation, options) }}
    {%- if not declared %}
        {%- set name = dbt_exporter.upsert_index_name(options['keys']) %}
        -- a full refresh builds beside the table that still has the name
    alter index if exists {{ relation.include(identifier=false) }}."{{ name }}" rename to "{{ name }}_old";
        {{ dbt_exporter.upsert_index_sql(relation, options) }}
    {%- endif -%}
{%- endmacro %}
