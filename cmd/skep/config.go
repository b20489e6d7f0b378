// SPDX-License-Identifier: Apache-2.0

package main

import (
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"

	"github.com/spf13/pflag"
	"sigs.k8s.io/yaml"
)

// loadConfig sets every flag that the YAML file names and the command line does not. Keys are the
// flags' names; an unknown key is an error that names it and the keys that look like it.
func loadConfig(path string, flags *pflag.FlagSet) error {
	b, err := os.ReadFile(path)
	if err != nil {
		return fmt.Errorf("configuration: %w", err)
	}
	var values map[string]any
	if err := yaml.UnmarshalStrict(b, &values); err != nil {
		return fmt.Errorf("configuration %s: %w", path, err)
	}
	var errs []error
	for _, key := range sortedKeys(values) {
		flag := flags.Lookup(key)
		if flag == nil || key == "config" || key == "help" {
			errs = append(errs, fmt.Errorf("configuration %s: unknown key %q%s", path, key, suggestion(key, flags)))
			continue
		}
		if flag.Changed {
			continue // the command line wins
		}
		if err := setFlag(flag, values[key]); err != nil {
			errs = append(errs, fmt.Errorf("configuration %s: key %q: %w", path, key, err))
		}
	}
	return errors.Join(errs...)
}

func sortedKeys(m map[string]any) []string {
	keys := make([]string, 0, len(m))
	for k := range m {
		keys = append(keys, k)
	}
	slices.Sort(keys)
	return keys
}

// pairs is the type of flags that are given once for each KEY=VALUE.
const pairs = "mapStringString"

// setFlag gives flag a value of the YAML file: a scalar, or a list of scalars where the flag takes several.
func setFlag(flag *pflag.Flag, value any) error {
	list, isList := value.([]any)
	several, takesList := flag.Value.(pflag.SliceValue)
	switch {
	case isList && takesList:
		items := make([]string, len(list))
		for i, item := range list {
			items[i] = fmt.Sprint(item)
		}
		return several.Replace(items)
	case isList && flag.Value.Type() == pairs:
		var errs []error
		for _, item := range list {
			errs = append(errs, flag.Value.Set(fmt.Sprint(item)))
		}
		return errors.Join(errs...)
	case isList:
		items := make([]string, len(list))
		for i, item := range list {
			items[i] = fmt.Sprint(item)
		}
		return flag.Value.Set(strings.Join(items, ","))
	case value == nil:
		return errors.New("has no value: remove the key or give it one")
	default:
		if _, isMap := value.(map[string]any); isMap {
			return fmt.Errorf("must be a %s, not a mapping", flag.Value.Type())
		}
		return flag.Value.Set(fmt.Sprint(value))
	}
}

// suggestion names flags that share a word with an unknown key.
func suggestion(key string, flags *pflag.FlagSet) string {
	var near []string
	flags.VisitAll(func(f *pflag.Flag) {
		for word := range strings.FieldsFuncSeq(key, isSeparator) {
			if len(word) > 2 && strings.Contains(f.Name, strings.ToLower(word)) && f.Name != "config" && !slices.Contains(near, f.Name) {
				near = append(near, f.Name)
			}
		}
	})
	if len(near) == 0 {
		return " (keys are the flags' names: see `skep server --help`)"
	}
	return " (did you mean " + strings.Join(near, " or ") + "?)"
}

func isSeparator(r rune) bool { return r == '-' || r == '_' || r == '.' }
