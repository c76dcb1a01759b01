{% macro get_incremental_upsert_sql(arg_dict) %}
    {%- set target = arg_dict['target_relation'] -%}
    {%- set temp = arg_dict['temp_relation'] -%}
    {%- set columns = arg_dict['dest_columns'] -%}
    {%- set options = dbt_exporter.upsert_options(columns) -%}
    {%- set keys = options['keys'] -%}
    {%- set names = columns | map(attribute='quoted') | list -%}
    {%- set chosen = get_merge_update_columns(config.get('merge_update_columns'), config.get('merge_exclude_columns'), columns) -%}
    {%- set updated = dbt_exporter.upsert_columns(chosen, columns, 'merge_update_columns') | reject('in', keys) | list -%}
    {%- set found = dbt_exporter.upsert_catalog(target, keys) -%}
    {%- set types = found['types'] -%}
    {#- Citus splits a comparison of records into columns, and its shards then refuse the statement -#}
    {%- set as_whole, differs = ('text', 'is distinct from') if found['in_shards'] else ('record', '*<>') -%}
    {%- set version = options['version'] -%}
    {%- set delete_when = options['delete_when'] -%}
    {%- set pairs = [] -%}
    {%- for key in keys -%}
        {%- do pairs.append('dbt_internal_source.' ~ key ~ ' = dbt_internal_dest.' ~ key) -%}
    {%- endfor -%}
    {%- set same_key = pairs | join(' and ') -%}
    {%- set stored = dbt_exporter.upsert_stored_sql(target, temp, keys) if found['in_shards'] else target -%}
    {%- set not_older = '(dbt_internal_dest.' ~ version ~ ' is null or dbt_internal_source.' ~ version
        ~ ' >= dbt_internal_dest.' ~ version ~ ')' if version else 'true' -%}

{{ dbt_exporter.upsert_check_sql(temp, options) }}
{% if not found['indexed'] %}{{ dbt_exporter.upsert_index_sql(target, options) }}{% endif %}
{% if delete_when %}
    {%- set marked = same_key ~ ' and ' ~ not_older ~ ' and coalesce((select ' ~ delete_when
        ~ ' from (select dbt_internal_source.*) as marked), false)' %}
    {%- if found['in_shards'] %}
delete from {{ target }} where ({{ keys | join(', ') }}) in (
    select {% for key in keys %}dbt_internal_source.{{ key }}{{ ', ' if not loop.last }}{% endfor %}
    from {{ temp }} as dbt_internal_source join {{ stored }} as dbt_internal_dest on {{ marked }}
);
    {%- else %}
delete from {{ target }} as dbt_internal_dest using {{ temp }} as dbt_internal_source
where {{ marked }};
    {%- endif %}
delete from {{ temp }} where coalesce(({{ delete_when }}), false);
{% endif %}
-- Without order by and analyze: of the plans tried, the quickest for small and for large batches.
-- The join leaves out unchanged rows, so that only rows that differ are written.
insert into {{ target }} as dbt_internal_dest ({{ names | join(', ') }})
select {% for name in names %}dbt_internal_source.{{ name }}{{ ', ' if not loop.last }}{% endfor %}
from {{ temp }} as dbt_internal_source
left join {{ stored }} as dbt_internal_dest on {{ same_key }}
where dbt_internal_dest.{{ keys[0] }} is null
    {%- if updated %}
    -- the casts make both sides plain records, which can be compared whatever the columns' types
    or (row({% for name in updated %}dbt_internal_source.{{ name }}::{{ types[name] }}{{ ', ' if not loop.last }}{% endfor %})::{{ as_whole }}
        {{ differs }} row({% for name in updated %}dbt_internal_dest.{{ name }}{{ ', ' if not loop.last }}{% endfor %})::{{ as_whole }}
        and {{ not_older }}
        {%- for predicate in arg_dict['incremental_predicates'] or [] %}
        and ({{ predicate }})
        {%- endfor %})
    {%- endif %}
on conflict ({{ keys | join(', ') }})
    {%- if updated %} do update set
        {% for name in updated %}
            {{ name }} = excluded.{{ name }}{{ ', ' if not loop.last }}
        {% endfor %}
        {%- if version %}
        where dbt_internal_dest.{{ version }} is null or excluded.{{ version }} >= dbt_internal_dest.{{ version }}
        {%- endif %}
    {%- else %} do nothing
    {%- endif %}
{% endmacro %}


{% macro upsert_options(columns) %}
    {%- set meta = config.get('meta') or {} -%}
    {%- set key = config.get('unique_key') -%}
    {%- set order_by = meta.get('upsert_order_by') or [] -%}
    {%- if not key -%}
        {{ exceptions.raise_compiler_error("incremental_strategy 'upsert' needs a unique_key") }}
    {%- endif -%}
    {%- set stamp = ['_exported_at'] if '_exported_at' in columns | map(attribute='name') else [] -%}
    {%- set order_by = [order_by] if order_by is string else order_by -%}
    {%- if not (order_by or stamp) -%}
        {%- set cursors = dbt_exporter.upsert_cursors(columns | map(attribute='name') | list, model.depends_on.nodes, []) -%}
        {#- with two cursors, neither of them tells which row is the newest -#}
        {%- set order_by = cursors if cursors | length == 1 else [] -%}
    {%- endif -%}
    {%- set version = dbt_exporter.upsert_columns(
        [meta['upsert_version']] if meta.get('upsert_version') else stamp, columns, 'upsert_version'
    ) -%}
    {{ return({
        'keys': dbt_exporter.upsert_columns([key] if key is string else key, columns, 'unique_key'),
        'order_by': dbt_exporter.upsert_columns(order_by or stamp, columns, 'upsert_order_by'),
        'version': version[0] if version else none,
        'delete_when': meta.get('upsert_delete_when'),
    }) }}
{% endmacro %}


{% macro upsert_cursors(names, ids, seen) %}
    {%- set found = [] -%}
    {%- for id in ids if id not in seen -%}
        {%- do seen.append(id) -%}
        {%- if id in graph.sources -%}
            {%- set definition = graph.sources[id].config.meta.get('exporter') or {} -%}
            {%- set cursor = (definition.get('source') or {}).get('cursor') or {} -%}
            {%- if cursor.get('field') in names -%} {%- do found.append(cursor['field']) -%} {%- endif -%}
        {%- elif id in graph.nodes -%}
            {%- do found.extend(dbt_exporter.upsert_cursors(names, graph.nodes[id].depends_on.nodes, seen)) -%}
        {%- endif -%}
    {%- endfor -%}
    {{ return(found | unique | list) }}
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
        {%- if same[0].quoted not in found -%} {%- do found.append(same[0].quoted) -%} {%- endif -%}
    {%- endfor -%}
    {{ return(found) }}
{% endmacro %}


{% macro upsert_newest_sql(sql, options) %}
    {%- set keys = options['keys'] -%}
    {%- if options['order_by'] %}
    select distinct on ({{ keys | join(', ') }}) * from (
        {{ sql }}
    ) as built
    order by {{ keys | join(', ') }}
        {%- for name in options['order_by'] %}, {{ name }} desc nulls last{% endfor %}
    {%- else %}
    select * from (
        {{ sql }}
    ) as built
    {%- endif -%}
{% endmacro %}


{% macro upsert_kept_sql(sql, options) %}
    {%- if options['delete_when'] %}
    select * from ({{ dbt_exporter.upsert_newest_sql(sql, options) }}) as newest
    where not coalesce(({{ options['delete_when'] }}), false)
    {%- else -%}
    {{ dbt_exporter.upsert_newest_sql(sql, options) }}
    {%- endif -%}
{% endmacro %}


{% macro upsert_catalog(relation, keys) %}
    {#- one query for everything: a small batch notices each round trip -#}
    {%- set oid = "'" ~ (relation | string | replace("'", "''")) ~ "'::regclass" -%}
    {%- set rows = run_query(
        "select attname, format_type(atttypid, atttypmod), " ~ dbt_exporter.upsert_indexed_sql(relation, keys)
        ~ ", to_regclass('pg_dist_partition') is not null from pg_attribute where attrelid = " ~ oid
        ~ " and attnum > 0 and not attisdropped"
    ) -%}
    {%- set types = {} -%}
    {%- for row in rows -%} {%- do types.update({'"' ~ row[0] ~ '"': row[1]}) -%} {%- endfor -%}
    {%- set in_shards = rows[0][3]
        and run_query("select from pg_dist_partition where logicalrelid = " ~ oid) | length > 0 -%}
    {{ return({'types': types, 'indexed': rows[0][2], 'in_shards': in_shards}) }}
{% endmacro %}


{% macro upsert_stored_sql(relation, temp, keys) %}
    {#- the batch is on the coordinator: only the stored rows that have one of its keys must travel there -#}
    {%- set key = '(' ~ keys | join(', ') ~ ')' -%}
    {{ return('(select * from ' ~ relation ~ ' where ' ~ key ~ ' in (select ' ~ keys | join(', ') ~ ' from ' ~ temp ~ '))') }}
{% endmacro %}
