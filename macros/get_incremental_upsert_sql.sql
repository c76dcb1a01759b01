{% macro get_incremental_upsert_sql(arg_dict) %}
    {%- set target = arg_dict['target_relation'] -%}
    {%- set temp = arg_dict['temp_relation'] -%}
    {%- set columns = arg_dict['dest_columns'] -%}
    {%- set unique_key = arg_dict['unique_key'] -%}
    {%- if not unique_key -%}
        {{ exceptions.raise_compiler_error("incremental_strategy 'upsert' needs a unique_key") }}
    {%- endif -%}
    {%- set keys = dbt_exporter.upsert_columns([unique_key] if unique_key is string else unique_key, columns, 'unique_key') -%}
    {%- set names = columns | map(attribute='quoted') | list -%}

    {%- set chosen = get_merge_update_columns(config.get('merge_update_columns'), config.get('merge_exclude_columns'), columns) -%}
    {%- set updated = dbt_exporter.upsert_columns(chosen, columns, 'merge_update_columns') | reject('in', keys) | list -%}

    {%- set order_by = (config.get('meta') or {}).get('upsert_order_by') -%}
    {%- if order_by -%}
        {%- set order_by = dbt_exporter.upsert_columns([order_by] if order_by is string else order_by, columns, 'upsert_order_by') -%}
    {%- else -%} {%- set order_by = ['"_exported_at"'] if '"_exported_at"' in names else [] -%}
    {%- endif -%}

    {%- do dbt_exporter.ensure_unique_index(target, keys) -%}
    {%- set types = dbt_exporter.column_types(target) -%}

insert into {{ target }} ({{ names | join(', ') }})
select {% for name in names %}t.{{ name }}{{ ', ' if not loop.last }}{% endfor %}
from (
    select distinct on ({{ keys | join(', ') }}) {{ names | join(', ') }}
    from {{ temp }}
    order by {{ keys | join(', ') }}{% for name in order_by %}, {{ name }} desc nulls last{% endfor %}
) as t
left join {{ target }} as d
    on {% for key in keys %}t.{{ key }} = d.{{ key }}{{ ' and ' if not loop.last }}{% endfor %}
where d.{{ keys[0] }} is null
    {%- if updated %}
        -- the casts make both sides plain records, compared as a whole and whatever the types
    or row({% for name in updated %}t.{{ name }}::{{ types[name] }}{{ ', ' if not loop.last }}{% endfor %})::record
    *<> row({% for name in updated %}d.{{ name }}{{ ', ' if not loop.last }}{% endfor %})::record
    {%- endif %}
on conflict ({{ keys | join(', ') }})
    {%- if updated %} do update set
        {% for name in updated %}
            {{ name }} = excluded.{{ name }}{{ ', ' if not loop.last }}
        {% endfor %}
    {%- else %} do nothing
    {%- endif %}
{% endmacro %}


{% macro upsert_columns(wanted, columns, option) %}
    {%- set found = [] -%}
    {%- for name in wanted -%}
        {%- set bare = name.strip('"') -%}
        {%- set same = columns | selectattr('name', 'equalto', bare) | list
            or columns | selectattr('name', 'equalto', bare | lower) | list -%}
        {%- if not same -%}
            {{ exceptions.raise_compiler_error(option ~ ": no column '" ~ name ~ "' in " ~ this) }}
        {%- endif -%}
        {%- do found.append(same[0].quoted) -%}
    {%- endfor -%}
    {{ return(found) }}
{% endmacro %}


{% macro column_types(relation) %}
    {%- set rows = run_query(
        "select attname, format_type(atttypid, atttypmod) from pg_attribute"
        ~ " where attrelid = '" ~ (relation | string | replace("'", "''")) ~ "'::regclass and attnum > 0 and not attisdropped"
    ) -%}
    {%- set types = {} -%}
    {%- for row in rows -%} {%- do types.update({'"' ~ row[0] ~ '"': row[1]}) -%} {%- endfor -%}
    {{ return(types) }}
{% endmacro %}


{% macro ensure_unique_index(relation, keys) %}
    {%- set names = [] -%}
    {%- for key in keys -%}
        {%- do names.append("'" ~ (key.strip('"') | replace("'", "''")) ~ "'") -%}
    {%- endfor -%}
    {%- set found -%}
        select 1
        from pg_index as i
        where i.indrelid = '{{ relation | string | replace("'", "''") }}'::regclass
            and i.indisunique and i.indisvalid and i.indimmediate
            and i.indpred is null and i.indexprs is null
            and (
                select array_agg(a.attname::text order by a.attname::text)
                from pg_attribute as a
                where a.attrelid = i.indrelid
                    and a.attnum = any ((i.indkey::int2[])[0:i.indnkeyatts - 1])
            ) = (select array_agg(k order by k) from unnest(array[{{ names | join(', ') }}]::text[]) as k)
    {%- endset -%}
    {%- if run_query(found) | length == 0 -%}
        {%- do run_query('create unique index on ' ~ relation ~ ' (' ~ keys | join(', ') ~ ')') -%}
    {%- endif -%}
{% endmacro %}
