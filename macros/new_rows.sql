{% macro new_rows(column='_exported_at') -%}
    {{ column }}
    > (select coalesce(max({{ column.split('.') | last }}), '-infinity') from {{ this }})
{%- endmacro %}
