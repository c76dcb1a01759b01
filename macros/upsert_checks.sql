{% macro upsert_check_sql(relation, options) %}
    {%- set keys = options['keys'] -%}
    {%- set label = keys | join(', ') | replace('"', '') | replace("'", "''") %}
do $upsert$
declare found text;
begin
    if not exists (
        select from {{ relation }} group by {{ keys | join(', ') }}
        having count(*) > 1{% for key in keys %} or {{ key }} is null{% endfor %}
    ) then
        return;
    end if;
    select count(*)::text into found from {{ relation }}
    where {% for key in keys %}{{ key }} is null{{ ' or ' if not loop.last }}{% endfor %};
    if found <> '0' then
        raise exception using
            message = 'upsert: ' || found || ' rows have a null in unique_key ({{ label }})',
            hint = 'leave them out in the model, or take another key';
    end if;
    {%- if options['order_by'] %}
    delete from {{ relation }} as built using (
        select ctid as place, row_number() over (
            partition by {{ keys | join(', ') }}
            order by {% for name in options['order_by'] %}{{ name }} desc nulls last{{ ', ' if not loop.last }}{% endfor %}
        ) as turn
        from {{ relation }}
    ) as ordered
    where built.ctid = ordered.place and ordered.turn > 1;
    {%- else %}
    select string_agg(shown, '; ') into found from (
        {{ dbt_exporter.upsert_shown_keys_sql(relation, keys) }}
    ) as twice;
    raise exception using
        message = 'upsert: several rows share unique_key ({{ label }}), such as ' || found,
        hint = 'name the columns that tell the newest in meta.upsert_order_by';
    {%- endif %}
end $upsert$;
{% endmacro %}


{% macro upsert_index_sql(relation, options) %}
    {%- set keys = options['keys'] -%}
    {%- set label = keys | join(', ') | replace('"', '') | replace("'", "''") -%}
    {%- set name = dbt_exporter.upsert_index_name(keys) -%}
    {%- set shown = dbt_exporter.upsert_shown_keys_sql(relation, keys) -%}
    {%- set listing = 'select ' ~ keys | join(', ') ~ ', count(*) from ' ~ relation ~ ' group by ' ~ keys | join(', ') ~ ' having count(*) > 1' %}
do $upsert$
declare found text;
begin
    if {{ dbt_exporter.upsert_indexed_sql(relation, keys) }} then
        return;
    end if;
    begin
        create unique index "{{ name }}" on {{ relation }} ({{ keys | join(', ') }});
    exception when unique_violation then
        select string_agg(shown, '; ') into found from (
            {{ shown }}
        ) as twice;
        raise exception using
            message = 'upsert: {{ this.schema | replace("'", "''") }}.{{ this.identifier | replace("'", "''") }} holds rows that share unique_key ({{ label }}), such as ' || found,
            hint = 'remove them, or run with --full-refresh; all of them: {{ listing | replace("'", "''") }}';
    end;
end $upsert$;
{% endmacro %}


{% macro upsert_indexed_sql(relation, keys) %}
    {%- set name = relation | string | replace("'", "''") -%}
    {%- set names = [] -%}
    {%- for key in keys -%}
        {%- do names.append(key[1:-1] | replace('""', '"') | replace("'", "''")) -%}
    {%- endfor %} exists (
        select
        from pg_index as i
        where
            i.indrelid = '{{ name }}'::regclass
            and i.indisunique
            and i.indisvalid
            and i.indimmediate
            and i.indpred is null
            and i.indexprs is null
            and (
                select array_agg(a.attname::text order by a.attname::text)
                from pg_attribute as a
                where
                    a.attrelid = i.indrelid
                    and a.attnum = any((i.indkey::int2[])[0:i.indnkeyatts - 1])
            ) = (
                select array_agg(k order by k)
                from unnest(array['{{ names | join("', '") }}']::text[]) as k
            )
    )
{%- endmacro %}


{% macro upsert_index_name(keys) %}
    {{ return((this.identifier[:40] ~ '__upsert_' ~ local_md5(keys | join(','))[:8]) | replace('"', '')) }}
{% endmacro %}


{% macro upsert_shown_keys_sql(relation, keys) %}
    {%- set shown = [] -%}
    {%- for key in keys -%}
        {%- do shown.append("'" ~ (key[1:-1] | replace("'", "''")) ~ "=' || " ~ key ~ "::text") -%}
    {%- endfor %}
    select concat_ws(', ', {{ shown | join(', ') }}) as shown
    from {{ relation }}
    group by {{ keys | join(', ') }}
    having count(*) > 1
    order by {{ keys | join(', ') }}
    limit 3
{% endmacro %}
