{% test loads_end_well(model, within='26 hours') %}
    {#- `exporter` reads the root project alone. Runs of definitions that were removed do not count. -#}
    {%- set keys = [] -%}
    {%- if execute -%}
        {%- for node in graph.sources.values() -%}
            {%- set meta = node.config.get('meta') or node.get('meta') or {} -%}
            {%- if meta.exporter and node.package_name == project_name -%}
                {%- set key = meta.exporter.key or node.source_name ~ '.' ~ node.name -%}
                {%- do keys.append("'" ~ dbt.escape_single_quotes(key) ~ "'") -%}
            {%- endif -%}
        {%- endfor -%}
    {%- endif %}

    with
        definitions as (

            select
                key,
                max(id) filter (where status in ('failed', 'interrupted')) as last_failed,
                max(id) filter (where status = 'ok') as last_ok,
                max(started_at) filter (where status = 'ok') as last_ok_at,
                min(started_at) as first_at

            from {{ model }}

            where status <> 'locked' and key in ({{ keys | join(', ') or 'null' }})

            group by key

        )

    select *
    from definitions
    where
        last_failed > coalesce(last_ok, 0)
        or coalesce(last_ok_at, first_at) < current_timestamp - interval '{{ within }}'
{% endtest %}
