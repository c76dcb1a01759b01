{% macro postgres__create_table_as(temporary, relation, sql) -%}
    {%- if model.language == 'python' -%}
        {%- set sql = dbt_exporter.python_model_sql() -%}
    {%- endif -%}
    {%- if config.get('materialized') != 'incremental' or config.get('incremental_strategy') != 'upsert' -%}
        {{ return(dbt.postgres__create_table_as(temporary, relation, sql)) }}
    {%- endif -%}
    {#- builds of one model wait for one another before they read: a build that read earlier and
        wrote later would undo the updates of the other -#}
    {%- set lock = 'upsert ' ~ this | string | replace("'", "''") %}
    select pg_advisory_xact_lock(hashtextextended('{{ lock }}', 0))
    ;
    {%- if temporary -%} {{ dbt.postgres__create_table_as(true, relation, sql) }}
    {%- else -%} {{ dbt_exporter.upsert_first_build_sql(relation, sql) }}
    {%- endif -%}
{%- endmacro %}


{#- dbt runs no strategy on the first build and on a full refresh -#}
{% macro upsert_first_build_sql(relation, sql) -%}
    {%- if config.get('contract').enforced -%}
        {#- dbt's message comes first: it names all missing columns, ours only one of them -#}
        {%- do get_assert_columns_equivalent(sql) -%}
    {%- endif -%}
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
        {#- during a full refresh, the old table still exists, and its index has this name #}
    alter index if exists {{ relation.include(identifier=false) }}."{{ name }}" rename to "{{ name }}_old";
        {{ dbt_exporter.upsert_index_sql(relation, options) }}
    {%- endif -%}
{%- endmacro %}
